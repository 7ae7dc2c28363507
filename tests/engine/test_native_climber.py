"""The native engine against the torch module: bfloat16 apart, the same numbers, whatever the shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rankd.engine.native.support import why_not
from rankd.errors import ConfigError, EngineFailure
from rankd.features.schema import (
    Categorical,
    FeatureSchema,
    Numeric,
    Strategy,
    SubSequence,
    Task,
)
from rankd.models.climber import Climber
from rankd.types import Array

OPTIONS: dict[str, Any] = {"width": 128, "heads": 4, "layers": 2, "ffn_ratio": 2, "hidden": 64}
LONGEST = 48
CLOSE = 0.05  # of logits with a standard deviation of 1: bfloat16 has 3 significant digits


def schema_of(blocks: int = 2, features: bool = True) -> FeatureSchema:
    """A schema with a column of every kind, or with none."""
    return FeatureSchema(
        num_item_rows=50,
        event_types=("view", "buy"),
        sub_sequences=(SubSequence(Strategy.RECENT),) * blocks,
        history_length=LONGEST,
        history_buckets=(LONGEST,),
        candidate_buckets=(16,),
        tasks=(Task("click"), Task("buy"), Task("like")),
        item_categorical=(Categorical("genre", 1, 5, 2),) if features else (),
        item_numeric=(Numeric("price"), Numeric("age"), Numeric("size")) if features else (),
        user_categorical=(Categorical("plan", 1, 3),) if features else (),
        user_numeric=(Numeric("visits"),) if features else (),
        event_values=(Numeric("seconds"),) if features else (),
    )


def model_of(schema: FeatureSchema, options: dict[str, Any]) -> Climber:
    """A Climber whose every weight, bias and temperature is random."""
    torch.manual_seed(0)
    model = Climber(schema, **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name or "temperature" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def history_of(
    schema: FeatureSchema, tokens: int, lengths: list[int], seed: int = 0, since: int = 0
) -> dict[str, Array]:
    """Random histories (1, N, tokens), of which `lengths` are real."""
    random = np.random.default_rng(seed)
    shape = 1, schema.num_sub_sequences, tokens
    return {
        "history_item": random.integers(2, schema.num_item_rows, shape, np.int32),
        "history_event": random.integers(0, 2, shape, np.int32),
        "history_time": np.sort(random.integers(since, since + 10**6, shape, np.int32)),
        "history_length": np.array([lengths], np.int32),
    } | (
        {
            "history_categories": random.integers(0, schema.num_item_codes, (*shape, schema.item_columns), np.int32),
            "history_values": random.standard_normal((*shape, len(schema.event_values)), np.float32),
        }
        if schema.item_columns
        else {}
    )


def candidates_of(schema: FeatureSchema, count: int) -> dict[str, Array]:
    """Random candidates of one user."""
    random = np.random.default_rng(7)
    arrays = {
        "candidate_item": random.integers(1, schema.num_item_rows, (1, count), np.int32),
        "context_time": np.array([3 * 10**6], np.int32),
    }
    if schema.item_columns:
        arrays |= {
            "candidate_categories": random.integers(
                0, schema.num_item_codes, (1, count, schema.item_columns), np.int32
            ),
            "candidate_numeric": random.standard_normal((1, count, schema.candidate_numeric), np.float32),
            "context_categories": random.integers(0, schema.num_user_codes, (1, schema.user_columns), np.int32),
            "context_numeric": random.standard_normal((1, len(schema.user_numeric)), np.float32),
        }
    return arrays


@pytest.fixture(scope="module", autouse=True)
def _suits() -> None:
    if reason := why_not(OPTIONS, schema_of()):
        pytest.skip(reason)


def native_of(model: Climber, schema: FeatureSchema, options: dict[str, Any], threads: int = 1) -> Any:
    from rankd.engine.native.native_climber import NativeClimber

    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return NativeClimber(weights, options, schema, threads)


def tensors(arrays: dict[str, Array]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def floats(bits: Array) -> Array:
    wide: Array = (bits.astype(np.uint32) << 16).view(np.float32)
    return wide


@torch.inference_mode()
@pytest.mark.parametrize(
    ("tokens", "lengths", "count"),
    [(48, [48, 48], 16), (48, [48, 17], 5), (33, [1, 31], 1), (7, [0, 7], 13), (1, [0, 0], 3), (32, [32, 16], 29)],
)
def test_scores_as_the_module_does(tokens: int, lengths: list[int], count: int) -> None:
    schema = schema_of()
    model = model_of(schema, OPTIONS)
    history, candidates = history_of(schema, tokens, lengths), candidates_of(schema, count)
    native = native_of(model, schema, OPTIONS)
    expected = model.encode(tensors(history))
    state = native.encode(history)
    for n, length in enumerate(lengths):
        difference = (
            floats(state["keys_values"])[0, n, :, :, :length] - expected["keys_values"][0, n, :, :, :length].numpy()
        )
        assert np.abs(difference).max(initial=0.0) < CLOSE
        assert not state["keys_values"][0, n, :, :, length:].any()
    logits = native.score(state, candidates)
    assert logits.shape == (count, 3)
    assert np.abs(logits - model.score(expected, tensors(candidates))[0].numpy()).max() < CLOSE


def shaped(*blocks: int, **layer: int) -> dict[str, Any]:
    """Options of a pruned Climber: so many layers in each block, all of 96 neurons unless told otherwise."""
    sizes = {"heads": 4, "head_width": 32, "ffn": 96} | layer
    fusion = {"heads": 4, "head_width": 32, "gate": 64}
    return OPTIONS | {"shape": {"blocks": [[sizes] * count for count in blocks], "fusion": fusion}}


@torch.inference_mode()
@pytest.mark.parametrize(
    ("blocks", "features", "more"),
    [
        (1, True, {}),
        (3, False, {}),
        (2, False, {"heads": 2}),
        (4, True, {"direct": False, "layers": 1}),
        (2, True, {"width": 64}),  # heads of 16
        (1, True, {"heads": 1, "layers": 3}),
        (4, False, {"width": 96, "heads": 2}),  # heads of 48
        (2, True, shaped(1, 1)),
        (2, False, shaped(3, 3, ffn=32)),
    ],
)
def test_other_models(blocks: int, features: bool, more: dict[str, Any]) -> None:
    schema, options = schema_of(blocks, features), OPTIONS | more
    model = model_of(schema, options)
    history, candidates = history_of(schema, 20, [20] * blocks), candidates_of(schema, 14)
    native = native_of(model, schema, options)
    expected = model.score(model.encode(tensors(history)), tensors(candidates))[0].numpy()
    assert np.abs(native.score(native.encode(history), candidates) - expected).max() < CLOSE


@torch.inference_mode()
@pytest.mark.parametrize("options", [OPTIONS, OPTIONS | {"width": 64}], ids=["heads of 32", "heads of 16"])
@pytest.mark.parametrize(
    ("known", "new"), [([20, 3], [5, 5]), ([0, 16], [1, 4]), ([30, 30], [0, 2]), ([1, 2], [17, 13])]
)
def test_extends_as_the_module_does(known: list[int], new: list[int], options: dict[str, Any]) -> None:
    schema = schema_of()
    model = model_of(schema, options)
    native = native_of(model, schema, options)
    history = history_of(schema, 30, known)
    more = history_of(schema, max(new), new, seed=1, since=10**6)
    expected = model.extend(model.encode(tensors(history)), tensors(more))
    made = native.extend(native.encode(history), more)
    assert made["lengths"].tolist() == [[a + b for a, b in zip(known, new, strict=True)]]
    for n, length in enumerate(new):
        difference = (
            floats(made["keys_values"])[0, n, :, :, :length] - expected["keys_values"][0, n, :, :, :length].numpy()
        )
        assert np.abs(difference).max(initial=0.0) < CLOSE


def test_an_extended_state_scores_as_an_encoded_one() -> None:
    schema = schema_of()
    native = native_of(model_of(schema, OPTIONS), schema, OPTIONS)
    whole = history_of(schema, 40, [40, 40])
    first, rest = (
        {name: array[:, :, part] if array.ndim > 2 else np.full_like(array, size) for name, array in whole.items()}
        for part, size in ((slice(0, 23), 23), (slice(23, 40), 17))
    )
    state = native.encode(first)
    made = native.extend(state, rest)
    joined = {
        "keys_values": np.concatenate([state["keys_values"], made["keys_values"]], 4),
        "times": whole["history_time"],
        "lengths": made["lengths"],
    }
    candidates = candidates_of(schema, 11)
    assert np.abs(native.score(joined, candidates) - native.score(native.encode(whole), candidates)).max() < 1e-6


def test_writes_where_the_caller_keeps_it() -> None:
    schema = schema_of()
    native = native_of(model_of(schema, OPTIONS), schema, OPTIONS)
    history = history_of(schema, 9, [9, 4])
    made = native.encode(history)
    into = {name: np.full_like(array, 1) for name, array in made.items()}
    assert native.encode(history, into) is into
    assert all((into[name] == made[name]).all() for name in made)


def test_threads_and_twins_compute_the_same() -> None:
    schema = schema_of(3)
    one, two = (native_of(model_of(schema, OPTIONS), schema, OPTIONS, threads) for threads in (1, 2))
    history, candidates = history_of(schema, 31, [31, 0, 12]), candidates_of(schema, 13)
    state, expected = one.encode(history), one.score(one.encode(history), candidates)
    for native in (two, two.twin(), one.twin()):
        assert (native.encode(history)["keys_values"] == state["keys_values"]).all()
        assert np.abs(native.score(state, candidates) - expected).max() < 1e-6
        native.close()


def test_an_unknown_row_reads_the_padding_and_not_beyond_the_table() -> None:
    schema = schema_of()
    native = native_of(model_of(schema, OPTIONS), schema, OPTIONS)
    state, candidates = native.encode(history_of(schema, 9, [9, 4])), candidates_of(schema, 4)
    candidates["candidate_item"][:] = 0
    padding = native.score(state, candidates)
    candidates["candidate_item"][0] = [-1, 50, 2**31 - 1, 0]
    assert (native.score(state, candidates) == padding).all()


def test_says_what_it_does_not_do() -> None:
    assert "'hstu'; only climber" in str(why_not(OPTIONS, schema_of(), "hstu"))
    assert "width / heads is 8" in str(why_not({"width": 64, "heads": 8}, schema_of()))
    assert "width is 48" in str(why_not({"width": 48, "heads": 3}, schema_of()))
    assert "width x blocks / 4 is 16" in str(why_not({"width": 64, "heads": 2}, schema_of(1)))
    schema = schema_of()
    for options, reason in (
        (shaped(1, 2), "unequal sizes"),
        (shaped(2, 2, up_rank=8), "low rank"),
        (shaped(2, 2, heads=3), "not 4 heads of 32"),
        (shaped(2, 2, ffn=40), "feed-forward is 40"),
        (OPTIONS | {"shape": shaped(1, 1)["shape"] | {"repeats": 2}}, "shared 2 times"),
        (OPTIONS | {"shape": shaped(1, 1)["shape"] | {"fusion": {"heads": 4, "head_width": 32, "gate": 32}}}, "gate"),
    ):
        assert reason in str(why_not(options, schema))
    model = model_of(schema, OPTIONS)
    with pytest.raises(ConfigError, match="width / heads is 8"):
        native_of(model, schema, OPTIONS | {"heads": 16})
    native = native_of(model, schema, OPTIONS)
    state = native.encode(history_of(schema, 9, [9, 4]))
    with pytest.raises(EngineFailure, match="bfloat16"):
        native.score(state | {"keys_values": floats(state["keys_values"])}, candidates_of(schema, 4))
    with pytest.raises(ConfigError, match="tokens"):
        native.encode(history_of(schema, 500, [500, 500]))
