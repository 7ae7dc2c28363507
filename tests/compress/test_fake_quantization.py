"""Fake int8 is what the quantized graphs compute, to the last roundings; and gradients pass through it."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankd.build.export import export
from rankd.build.int8_graphs import GraphRun, Int8Plan, plan_at, product_places, quantize, read_graph, weight_integers
from rankd.build.pack import parity_requests
from rankd.compress.compression_recipe import Factorise, Matrix, Quantize, ShareLayers
from rankd.compress.distillation import logit_divergence
from rankd.compress.fake_quantization import FakeQuantized, call_limits, narrowed_activation, narrowed_weight
from rankd.compress.int8_search import int8_error, search_int8
from rankd.compress.steps import factorise, share_layers
from rankd.compress.surgery import Subject
from rankd.errors import BuildError
from rankd.models.protocol import create_model, logits_of
from rankd.train.batches import Batch, training_batches
from rankd.train.recipe import ModelChoice
from rankd.train.samples import baskets_between
from rankd.types import Features, Float32Array
from tests.train.small_log import TRAINING, small_dataset

DATASET = small_dataset()
REQUESTS = parity_requests(DATASET, 24)
SIZES = {"climber": {"width": 32, "heads": 2, "layers": 2, "hidden": 16}, "sasrec": {"width": 32, "heads": 2}}


def model_of(kind: str, seed: int = 0) -> nn.Module:
    """Climber or SASRec with random weights; of a Climber also with shared layers or projections of low rank."""
    name, _, change = kind.partition(" ")
    torch.manual_seed(seed)
    model = create_model(name, DATASET.schema, SIZES[name])
    for key, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15 if "tokens" not in key else 1.0)
        elif "log_temperature" in key:
            nn.init.normal_(parameter, mean=1.0, std=0.3)  # graphs fold it into the weights of the queries
    subject = Subject(ModelChoice(name, SIZES[name]), DATASET.schema, model.eval())
    if change == "shared":
        subject = share_layers(subject, ShareLayers())
    if change == "factorised":
        subject = factorise(subject, Factorise(rank=0.5, matrices=(Matrix.QKV, Matrix.UP, Matrix.DOWN), multiple=16))
    return subject.model


def logits_in_graphs(folder: Path, plan: Int8Plan, request: Features) -> Float32Array:
    """What OpenVINO makes of a request in int8, all else in float32."""
    arrays = {**request.history, **request.candidates}
    for name in ("encode", "score"):
        graph = read_graph(folder / f"{name}.xml")
        quantize(graph, plan.limits.get(name, {}))
        arrays |= GraphRun(graph)(arrays)
    made: Float32Array = arrays["logits"][0]
    return made


def spread(change: Float32Array) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(change**2)))


def logits_in_torch(model: nn.Module, request: Features) -> Float32Array:
    history, candidates = (
        {name: torch.from_numpy(array) for name, array in part.items()}
        for part in (request.history, request.candidates)
    )
    with torch.no_grad():
        made: Float32Array = logits_of(model.eval(), history, candidates)[0].numpy()
    return made


@pytest.mark.parametrize("kind", ["climber", "climber shared", "climber factorised", "sasrec"])
def test_fake_int8_is_what_the_quantized_graphs_compute(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    export(model, DATASET.schema, "openvino", tmp_path)
    found = search_int8(tmp_path, REQUESTS, Quantize(max_error=2.0))
    assert found.kept == ()
    calls = call_limits(model, tmp_path, found.plan, REQUESTS[0])
    assert {name: len(some) for name, some in calls.items()} == {
        name: len(some) for name, some in found.plan.limits.items()
    }
    fake = FakeQuantized(model, calls)
    changes: dict[str, list[Float32Array]] = {"fake": [], "float": []}
    for request in REQUESTS[:8]:
        real = logits_in_graphs(tmp_path, found.plan, request)
        changes["fake"].append((logits_in_torch(fake, request) - real).ravel())
        changes["float"].append((logits_in_torch(model, request) - real).ravel())
    error = {name: spread(np.concatenate(some)) for name, some in changes.items()}
    assert error["float"] > 1e-3  # int8 changes something
    assert error["fake"] < 0.05 * error["float"]


def test_a_layer_that_stays_in_float_does_so_in_torch(tmp_path: Path) -> None:
    model, request = model_of("climber"), REQUESTS[1]
    export(model, DATASET.schema, "openvino", tmp_path)
    whole = search_int8(tmp_path, REQUESTS[:8], Quantize(max_error=2.0)).plan
    part = Int8Plan({"score": dict(sorted(whole.limits["score"].items())[::2])})
    fake = FakeQuantized(model, call_limits(model, tmp_path, part, request))
    real = logits_in_graphs(tmp_path, part, request)
    change = spread(logits_in_torch(model, request) - real)
    assert change > 1e-3
    assert spread(logits_in_torch(fake, request) - real) < 0.05 * change


def test_a_plan_is_carried_over_to_other_weights_by_the_places_of_its_products(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("other", 1)):
        export(model_of("climber", seed), DATASET.schema, "openvino", tmp_path / name)
    found = search_int8(tmp_path / "one", REQUESTS, Quantize(max_error=2.0))
    places = product_places(tmp_path / "one", found.plan)
    assert plan_at(tmp_path / "one", places) == found.plan
    moved = plan_at(tmp_path / "other", places)
    assert {name: sorted(some.values()) for name, some in moved.limits.items()} == {
        name: sorted(some.values()) for name, some in found.plan.limits.items()
    }
    assert not set(moved.limits["score"]) & set(found.plan.limits["score"])
    assert int8_error(tmp_path / "one", REQUESTS, found.plan) == pytest.approx(found.error)
    assert int8_error(tmp_path / "other", REQUESTS, moved) > 0


def test_graphs_of_another_model_are_refused_by_the_name_of_the_product(tmp_path: Path) -> None:
    export(model_of("climber"), DATASET.schema, "openvino", tmp_path)
    found = search_int8(tmp_path, REQUESTS, Quantize(max_error=2.0))
    with pytest.raises(BuildError, match=r"product .* of the graphs is no linear layer of the model"):
        call_limits(model_of("climber", seed=1), tmp_path, found.plan, REQUESTS[0])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), outputs=st.integers(1, 40), inputs=st.integers(1, 40), zeros=st.booleans())
def test_weights_are_those_of_the_graphs(seed: int, outputs: int, inputs: int, zeros: bool) -> None:
    weight = np.random.default_rng(seed).normal(size=(outputs, inputs)).astype(np.float32)
    weight[0] *= 0 if zeros else 1e-6
    integers, scales = weight_integers(weight)
    made = narrowed_weight(torch.from_numpy(weight)).numpy()
    steps = np.abs(made - integers * scales) / scales
    assert steps.max() < 1.01  # a number in the middle of two may go to either
    assert (steps > 0.01).mean() < 0.02


def test_gradients_pass_through_rounding_but_not_where_an_activation_is_cut_off() -> None:
    x = torch.tensor([[0.3, -0.31, 5.0, -5.0]], requires_grad=True)
    narrowed_activation(x, 1.0).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    weight = torch.randn(5, 7, requires_grad=True)
    narrowed_weight(weight).sum().backward()
    assert weight.grad is not None
    assert (weight.grad == 1).all()


def test_all_weights_of_a_model_in_fake_int8_learn(tmp_path: Path) -> None:
    model = model_of("climber")
    export(model, DATASET.schema, "openvino", tmp_path)
    found = search_int8(tmp_path, REQUESTS, Quantize(max_error=2.0))
    fake = FakeQuantized(model, call_limits(model, tmp_path, found.plan, REQUESTS[0]))
    request = REQUESTS[1]
    history, candidates = (
        {name: torch.from_numpy(array) for name, array in part.items()}
        for part in (request.history, request.candidates)
    )
    logits_of(fake, history, candidates).square().sum().backward()
    still = [name for name, one in model.named_parameters() if "weight" in name and one.grad is None]
    assert [name for name in still if "tokens" not in name] == []


def with_large_channels(model: nn.Module, factor: float = 100.0) -> nn.Module:
    """The same function of its inputs in floats. Some channels after each norm are far larger than the others, as large
    transformers have them, so that eight bits leave next to no steps for the rest."""
    weights = model.state_dict()
    norms = [name.removesuffix(".weight") for name in weights if name.endswith(("norm.weight", "ffn.0.weight"))]
    readers = {name: name.replace("norm", "qkv").replace("ffn.0", "ffn.1") for name in norms if ".stack." in name}
    for norm, reader in {**readers, "head.0": "head.1"}.items():
        for part in ("weight", "bias"):
            weights[f"{norm}.{part}"][::8] *= factor
        weights[f"{reader}.weight"][:, ::8] /= factor
    return model


def distance(model: nn.Module, original: nn.Module, batch: Batch) -> float:
    """Between the logits of real candidates."""
    with torch.no_grad():
        mine, theirs = (logits_of(one.eval(), batch.history, batch.candidates) for one in (model, original))
    return spread((mine - theirs)[batch.real].numpy())


def test_tuning_in_fake_int8_gives_back_what_scales_alone_lose(tmp_path: Path) -> None:
    """On requests that it was not tuned on."""
    original = model_of("climber")
    model = with_large_channels(copy.deepcopy(original))
    export(model, DATASET.schema, "openvino", tmp_path)
    found = search_int8(tmp_path, REQUESTS[:8], Quantize(max_error=100.0))
    assert found.error > 1  # nothing is left of the scores
    fake = FakeQuantized(model, call_limits(model, tmp_path, found.plan, REQUESTS[1]))
    samples, _ = baskets_between(DATASET, 0, DATASET.train_until)
    *batches, unseen = itertools.islice(training_batches(DATASET, samples, TRAINING, epoch=0), 7)
    assert distance(model, original, unseen) < 1e-5
    before = distance(fake, original, unseen)
    optimiser = torch.optim.Adam(fake.parameters(), lr=1e-3)
    for step in range(36):
        batch = batches[step % len(batches)]
        with torch.no_grad():
            wanted = logits_of(original, batch.history, batch.candidates)
        loss = logit_divergence(logits_of(fake, batch.history, batch.candidates), wanted, batch.real)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert distance(fake, original, unseen) < 0.65 * before
