"""The rankers keep what serving relies on: splits, padding and batches change no score."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankd.bench.engine_suite.dense_model import DenseRanker
from rankd.errors import ConfigError
from rankd.features.assembly import appended_tokens, candidate_arrays, history_arrays
from rankd.features.schema import FeatureSchema, Strategy, SubSequence
from rankd.models.blocks import BlockRanker, time_bucket
from rankd.models.climber import Climber, Layer
from rankd.models.hstu import Hstu, HstuLayer
from rankd.models.protocol import create_model, is_split, logits_of
from tests.features.sample_schema import DAY, make_history, make_items, make_schema, make_user

KINDS = ["climber", "sasrec", "hstu", "dlrm", "examples/attentive_pooling.py:AttentivePooling"]
ITEMS, USER, NOW = make_items(), make_user(), 100 * DAY
ONE_VIEW, TWO_VIEWS = make_schema(SubSequence(Strategy.RECENT)), make_schema()
SCHEMAS = {kind: TWO_VIEWS if kind in ("climber", "hstu") else ONE_VIEW for kind in KINDS}


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(3)
    model = create_model(kind, SCHEMAS[kind], {})
    for parameter in model.parameters():  # fresh biases are zero; make every part of the model count
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


MODELS = {kind: model_of(kind) for kind in KINDS}


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def scores(kind: str, rows: list[int], candidates: list[int], schema: FeatureSchema | None = None) -> Tensor:
    schema, history = schema or SCHEMAS[kind], make_history(rows)
    packed = candidate_arrays(schema, ITEMS, history, np.asarray(candidates, np.int32), USER, NOW)
    with torch.inference_mode():
        logits = logits_of(MODELS[kind], tensors(history_arrays(schema, ITEMS, history)), tensors(packed))
    return logits[0, : len(candidates)]


HISTORIES = st.lists(st.integers(1, 31), max_size=12)
CANDIDATES = st.lists(st.integers(1, 31), min_size=2, max_size=16)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(HISTORIES, CANDIDATES, st.integers(1, 15))
def test_any_split_scores_like_the_whole(kind: str, rows: list[int], candidates: list[int], cut: int) -> None:
    cut = min(cut, len(candidates) - 1)
    parts = torch.cat([scores(kind, rows, candidates[:cut]), scores(kind, rows, candidates[cut:])])
    torch.testing.assert_close(parts, scores(kind, rows, candidates), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["climber", "sasrec", "hstu", "dlrm"])
@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 31), max_size=3), CANDIDATES)
def test_padding_of_the_history_changes_nothing(kind: str, rows: list[int], candidates: list[int]) -> None:
    wide = msgspec.structs.replace(SCHEMAS[kind], history_buckets=(8,))
    torch.testing.assert_close(
        scores(kind, rows, candidates), scores(kind, rows, candidates, wide), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_scores_like_its_requests_one_by_one(kind: str) -> None:
    histories = [make_history(rows) for rows in ([], [5, 6, 7, 8], [9] * 8)]
    history = [tensors(history_arrays(fixed(kind), ITEMS, one)) for one in histories]
    rows = np.asarray([3, 4, 5, 6], np.int32)
    candidates = [tensors(candidate_arrays(fixed(kind), ITEMS, one, rows, USER, NOW)) for one in histories]
    with torch.inference_mode():
        one_by_one = torch.cat([logits_of(MODELS[kind], h, c) for h, c in zip(history, candidates, strict=True)])
        together = logits_of(MODELS[kind], stacked(history), stacked(candidates))
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-5)


def fixed(kind: str) -> FeatureSchema:
    return msgspec.structs.replace(SCHEMAS[kind], history_buckets=(8,), candidate_buckets=(4,))


def stacked(dicts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([one[name] for one in dicts]) for name in dicts[0]}


@pytest.mark.parametrize("kind", KINDS)
def test_history_and_candidate_matter(kind: str) -> None:
    assert not torch.allclose(scores(kind, [5, 6, 7], [3, 4]), scores(kind, [9, 10, 7], [3, 4]))
    assert not torch.allclose(scores(kind, [5, 6, 7], [3, 3])[0], scores(kind, [5, 6, 7], [4, 4])[0])


def test_which_models_have_a_state() -> None:
    assert [is_split(MODELS[kind]) for kind in KINDS] == [True, True, True, True, False]


def test_climber_reads_every_block_position_and_time() -> None:
    model = Climber(make_schema())
    history = make_history([5, 6, 7, 5])
    packed = tensors(history_arrays(make_schema(), ITEMS, history))
    candidates = tensors(candidate_arrays(make_schema(), ITEMS, history, np.asarray([3], np.int32), USER, NOW))
    logits_of(model, packed, candidates).sum().backward()
    untouched = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    # Nobody reads what the last layer would make of the history, but its weights serve the candidates.
    assert untouched == []
    layer = model.get_submodule("blocks.0.stack.0")
    assert isinstance(layer, Layer)
    assert layer.bias.time.grad is not None
    assert layer.log_temperature.grad is not None
    assert bool(layer.log_temperature.grad.any())


@pytest.mark.parametrize("kind", ["climber", "hstu"])
@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.integers(1, 31), max_size=8), candidates=CANDIDATES)
def test_a_ranker_of_blocks_equals_its_dense_form(kind: str, rows: list[int], candidates: list[int]) -> None:
    """History and candidates in one sequence, with the single-user-many-items mask written out as a matrix."""
    model, schema, history = MODELS[kind], SCHEMAS[kind], make_history(rows)
    assert isinstance(model, BlockRanker)
    packed = candidate_arrays(schema, ITEMS, history, np.asarray(candidates, np.int32), USER, NOW)
    with torch.inference_mode():
        dense = DenseRanker(model)(tensors(history_arrays(schema, ITEMS, history)), tensors(packed))
    torch.testing.assert_close(dense[0, : len(candidates)], scores(kind, rows, candidates), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["climber", "hstu"])
@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.integers(1, 31), max_size=8), before=st.integers(0, 8), padding=st.integers(0, 4))
def test_an_extended_state_is_the_state_of_the_longer_history(
    kind: str, rows: list[int], before: int, padding: int
) -> None:
    schema = ONE_VIEW
    model = create_model(kind, schema, {}).eval()
    assert isinstance(model, BlockRanker)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    whole = history_arrays(schema, ITEMS, make_history(rows))
    cut = min(before, len(rows))
    with torch.inference_mode():
        state = model.encode(tensors({**whole, "history_length": np.asarray([[cut]], np.int32)}))
        new = appended_tokens(whole, (cut,), (len(rows) - cut + padding or 1,))
        added = model.extend(state, tensors(new))
        expected = model.encode(tensors(whole))
    count = len(rows) - cut
    assert added["lengths"].tolist() == [[len(rows)]]
    torch.testing.assert_close(
        added["keys_values"][..., :count, :], expected["keys_values"][..., cut : len(rows), :], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("form", ["paper", "dlrm-v3"])
def test_every_weight_of_an_hstu_counts(form: str) -> None:
    model = Hstu(TWO_VIEWS, form=form)
    history = make_history([5, 6, 7, 5])
    packed = tensors(history_arrays(TWO_VIEWS, ITEMS, history))
    candidates = tensors(candidate_arrays(TWO_VIEWS, ITEMS, history, np.asarray([3], np.int32), USER, NOW))
    logits_of(model, packed, candidates).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    layer = model.get_submodule("blocks.1.stack.0")
    assert isinstance(layer, HstuLayer)
    for parameter in (layer.bias.time, layer.bias.position, layer.uqkv.weight, layer.out.weight):
        assert parameter.grad is not None
        assert bool(parameter.grad.any())


def test_time_buckets_are_half_octaves_of_minutes() -> None:
    seconds = torch.tensor([-5, 0, 59, 60, 180, 86_400, 2**31 - 1])
    assert time_bucket(seconds).tolist() == [0, 0, 1, 2, 4, 20, 47]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("climbr", {}, "Did you mean 'climber'"),
        ("climber", {"widht": 3}, "widht"),
        ("nowhere.module:Model", {}, "cannot import"),
        ("examples/attentive_pooling.py:Pooling", {}, "has no class 'Pooling'"),
        ("missing.py:Model", {}, "no Python file"),
    ],
)
def test_a_wrong_model_name_says_what_to_do(kind: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model(kind, make_schema(), options)
