"""The formula against published figures, and against what torch counts."""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rankd.bench.flops import OPTIONS, Flops, ModelKind, ModelSizes, climber_flops, head_flops, model_flops, stack_flops
from rankd.bench.synthetic_model import schema_of
from rankd.bench.workload import load_workload
from rankd.build.export import example
from rankd.features.schema import candidate_specs, history_specs
from rankd.models.climber import Climber
from rankd.models.hstu import Hstu
from rankd.models.layer_shapes import HstuForm
from rankd.models.protocol import RankingModel, create_model


def test_published_figures() -> None:
    """DESIGN.md: 4 layers, d = 256, 4 heads, 512 history tokens, 128 candidates; the head there is one d x d layer."""
    head = 128 * head_flops(256, 256, 1)
    total = stack_flops(ModelSizes(blocks=1, layers=4, width=256), 512, 128) + Flops(head, head, head, head)
    assert round(total.dense / 1e9, 2) == 5.72
    assert round(total.useful / 1e9, 2) == 4.85
    assert round(total.candidates / 1e9, 2) == 1.09


def test_order_of_the_counts() -> None:
    counts = climber_flops(ModelSizes(blocks=2, layers=3, width=256), 256, 128)
    assert counts.dense > counts.useful > counts.needed > counts.candidates > 0


@pytest.mark.parametrize("kind", ModelKind)
@pytest.mark.parametrize("form", HstuForm)
def test_what_is_counted_is_what_torch_counts(kind: ModelKind, form: HstuForm) -> None:
    """Without numeric features, whose projections the formula leaves out; what is added is a candidate's look at
    itself, which torch does elementwise. Of the history torch computes all pairs, and the mask takes half of them."""
    workload = load_workload("small")
    sizes = msgspec.structs.replace(workload.model, kind=kind, form=form)
    schema = msgspec.structs.replace(schema_of(workload), item_numeric=(), match=(), event_values=())
    model = create_model(kind.value, schema, sizes.options()).eval()
    assert isinstance(model, RankingModel)
    tokens, candidates = 50, 20
    history = example(history_specs(schema), B=1, T=tokens, C=candidates)
    given = example(candidate_specs(schema), B=1, T=tokens, C=candidates)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        state = model.encode(history)
    encoded = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.score(state, given)
    counts, passed = model_flops(sizes, tokens, candidates), sizes.blocks * (sizes.layers - 1)
    itself = sizes.blocks * sizes.layers * candidates * 4 * sizes.width
    masked = passed * tokens * (tokens - 1) / 2 * 4 * sizes.width
    assert counter.get_total_flops() + itself == counts.candidates
    assert encoded - masked == counts.needed - counts.candidates


@pytest.mark.parametrize(("kind", "model"), [(ModelKind.CLIMBER, Climber), (ModelKind.HSTU, Hstu)])
def test_defaults_are_those_of_the_model(kind: ModelKind, model: type[nn.Module]) -> None:
    """A manifest does not name the options that were left out."""
    parameters = inspect.signature(model).parameters
    assert {name: parameters[name].default for name in OPTIONS[kind]} == OPTIONS[kind]


def test_small_is_the_packaged_recipe() -> None:
    recipe = tomllib.loads((Path(__file__).parents[2] / "src/rankd/train/recipes/demo.toml").read_text())
    workload, shapes, options = load_workload("small"), recipe["shapes"], recipe["model"]["options"]
    assert recipe["model"]["kind"] == "climber"
    assert {name: getattr(workload.model, name) for name in options} == options
    assert workload.block_tokens == shapes["history_length"]
    assert list(workload.buckets.history) == shapes["history_buckets"]
    assert list(workload.buckets.candidates) == shapes["candidate_buckets"]
    assert workload.model.blocks == len(shapes["sub_sequences"])
