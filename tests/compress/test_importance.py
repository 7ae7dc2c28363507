"""The criteria: Taylor finds what is useless by what it does to the loss; weights and lots do not."""

from __future__ import annotations

from itertools import islice
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rankd.compress.anatomy import Anatomy, anatomy_of
from rankd.compress.compression_recipe import Criterion
from rankd.compress.importance import Importance, importance_of, taylor
from rankd.errors import BuildError, DataError
from rankd.models.climber import Climber
from rankd.models.protocol import create_model
from rankd.train.batches import Batch, training_batches
from rankd.train.samples import baskets_between
from rankd.train.trainer import loss_of
from tests.train.small_log import RECIPE, TRAINING, small_dataset

DATASET = small_dataset()
SAMPLES, _ = baskets_between(DATASET, 0, DATASET.train_until)
BATCHES = list(islice(training_batches(DATASET, SAMPLES, TRAINING, 0), 4))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return loss_of(model, batch, 1.0)


def planted() -> tuple[Climber, Anatomy]:
    """Head 1 and neuron 2 of the first layer are useless: their results are 0 for every input; yet their weights that
    write the results are the largest ones. Channel 3 is neither read by anybody, and layer 1 of block 1 writes 0.
    """
    torch.manual_seed(2)
    model = cast(Climber, create_model("climber", DATASET.schema, RECIPE.model.options))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    layer = cast(Any, model.get_submodule("blocks.0.stack.0"))
    with torch.no_grad():
        width, head = layer.attention_width, slice(4, 8)
        layer.qkv.weight[2 * width :][head] = 0  # the values of head 1
        layer.qkv.bias[2 * width :][head] = 0
        layer.out.weight[:, head] = 3.0
        layer.ffn[1].weight[2] = 0
        layer.ffn[1].bias[2] = 0  # GELU(0) = 0
        layer.ffn[3].weight[:, 2] = 3.0
    return model.eval(), anatomy_of(model)


def judged(criterion: Criterion, seed: int = 0) -> Importance:
    model, anatomy = planted()
    return importance_of(criterion, model, anatomy, BATCHES, loss, seed)


def test_taylor_finds_the_useless_head_and_neuron() -> None:
    first = judged(Criterion.TAYLOR).blocks[0][0]
    assert first.heads[1] == 0.0
    assert first.heads[0] > 0.0
    assert np.argmin(first.neurons) == 2
    assert first.neurons[2] == 0.0


def test_magnitude_is_taken_in_by_large_weights_and_random_by_nothing() -> None:
    first = judged(Criterion.MAGNITUDE).blocks[0][0]
    assert np.argmax(first.heads) == 1
    assert np.argmax(first.neurons) == 2
    drawn = {int(np.argmin(judged(Criterion.RANDOM, seed).blocks[0][0].neurons)) for seed in range(12)}
    assert len(drawn) > 4


def test_taylor_predicts_what_a_small_change_does_to_the_loss() -> None:
    """A structure scaled by 1 - step changes the loss by step x importance, to first order."""
    model, anatomy = planted()
    (batch,) = BATCHES[:1]
    made = taylor(model, anatomy, [batch], loss)
    layer = cast(Any, model.get_submodule("blocks.1.stack.0"))
    step = 1e-3
    cuts = {
        "head": (layer.out.weight, (slice(None), slice(0, 4)), made.blocks[1][0].heads[0]),
        "neuron": (layer.ffn[3].weight, (slice(None), 5), made.blocks[1][0].neurons[5]),
    }
    for name, (weight, index, expected) in cuts.items():
        with torch.no_grad():
            before, kept = loss(model, batch), weight[index].clone()
            weight[index] *= 1 - step
            change = float(loss(model, batch) - before)
            weight[index] = kept
        assert abs(change) / step == pytest.approx(expected, rel=0.1, abs=2e-4), name


def test_a_channel_that_nobody_writes_is_unimportant() -> None:
    model, anatomy = planted()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            writes = any(name.endswith(f"{one}.{kind}") for one in ("out", "ffn.3") for kind in ("weight", "bias"))
            if writes or name.startswith(("history_norm", "candidate_norm")):
                parameter[3] = 0
    made = importance_of(Criterion.TAYLOR, model, anatomy, BATCHES, loss, 0)
    assert np.argmin(made.channels) == 3
    assert made.channels[3] == 0.0


def test_a_layer_is_judged_by_all_that_it_writes() -> None:
    model, anatomy = planted()
    layer = cast(Any, model.get_submodule("blocks.1.stack.1"))
    with torch.no_grad():
        for parameter in (*layer.out.parameters(), *layer.ffn[3].parameters()):
            parameter.zero_()
    made = importance_of(Criterion.TAYLOR, model, anatomy, BATCHES, loss, 0)
    assert [[one.whole == 0 for one in stack] for stack in made.blocks] == [[False, False], [False, True]]


def test_no_requests_and_no_numbers_are_refused() -> None:
    model, anatomy = planted()
    with pytest.raises(DataError, match="no requests"):
        importance_of(Criterion.TAYLOR, model, anatomy, [], loss, 0)
    with torch.no_grad():
        cast(Any, model).head[4].bias.fill_(torch.nan)
    with pytest.raises(DataError, match="no numbers"):
        importance_of(Criterion.TAYLOR, model, anatomy, BATCHES, loss, 0)


@pytest.mark.parametrize(("kind", "name"), [("dlrm", "Dlrm"), ("hstu", "Hstu")])
def test_a_model_of_another_kind_is_refused_by_its_name(kind: str, name: str) -> None:
    with pytest.raises(BuildError, match=f"{name} cannot be compressed.*climber and sasrec can"):
        anatomy_of(create_model(kind, DATASET.schema, {}))
