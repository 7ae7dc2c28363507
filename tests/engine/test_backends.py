"""Every target and precision: cached equals uncached, extended equals re-encoded, batched equals single, split equals
whole, all of it equals the reference; tolerances are stated in BOUNDS.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankd import Event, Ranker, RankRequest
from rankd.build.export import export
from rankd.build.pack import BuildOptions, build_artifact, parity_requests
from rankd.compress.compression_recipe import Quantize
from rankd.compress.int8_search import search_int8
from rankd.engine.backend import EngineConfig, Executor, Precision
from rankd.engine.state_arrays import SideBySide
from rankd.engine.targets import PRECISIONS, TARGETS, runs_here, why_not
from rankd.errors import ArtifactError
from rankd.features.assembly import candidate_arrays, history_arrays
from rankd.models.protocol import create_model
from rankd.states.state_config import StateConfig, Storage
from rankd.train.recipe import ModelChoice
from rankd.types import Float32Array, UserState
from tests.train.small_log import RECIPE, small_dataset

DATASET = small_dataset(window_step=8)
USERS, ITEMS = DATASET.log.user_ids, DATASET.log.item_ids
SIZES = {"width": 64, "heads": 2, "layers": 2, "hidden": 32}  # what the native engine takes: multiples of 32
BOUNDS = {Precision.FP32: 1e-4, Precision.BF16: 0.1, Precision.INT8: 0.3}
"""Largest difference of a logit between two ways to the same score, for weights of standard deviation 0.2."""
STORAGE_BOUNDS = {Storage.FP32: 1e-4, Storage.BF16: 0.05, Storage.INT8: 0.1}
WAYS = [(target, precision) for target in TARGETS for precision in PRECISIONS[target]]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A Climber of random weights."""
    torch.manual_seed(1)
    model = create_model("climber", DATASET.schema, SIZES).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def artifact(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    """It, built for all targets."""
    recipe = msgspec.structs.replace(RECIPE, model=ModelChoice("climber", SIZES))
    targets = tuple(target for target in TARGETS if runs_here(target))
    options = BuildOptions("films", "1", targets=targets, fall_back=True)
    return str(build_artifact(tmp_path_factory.mktemp("models"), model, DATASET, recipe, options))


@pytest.fixture(scope="module")
def int8_artifact(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    """It in int8."""
    choice = ModelChoice("climber", SIZES)
    root = tmp_path_factory.mktemp("models")
    export(model, DATASET.schema, "openvino", root / "graphs")
    found = search_int8(root / "graphs", parity_requests(DATASET, 48), Quantize(max_error=1.0))
    recipe = msgspec.structs.replace(RECIPE, model=choice)
    options = BuildOptions("films", "1", Precision.INT8, int8=found.plan)
    return str(build_artifact(root, model, DATASET, recipe, options))


def opened(artifact: str, target: str, precision: Precision, states: StateConfig | None = None) -> Ranker:
    if reason := why_not(target, precision):
        pytest.skip(reason)
    return Ranker.load(artifact, EngineConfig(target=target, precision=precision, executors=1), states=states)


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}-{way[1].value}", scope="module")
def way(request: pytest.FixtureRequest) -> tuple[str, Precision]:
    """A target and a precision."""
    chosen: tuple[str, Precision] = request.param
    return chosen


@pytest.fixture(scope="module")
def pair(artifact: str, int8_artifact: str, way: tuple[str, Precision]) -> Iterator[tuple[Ranker, Ranker, float]]:
    """One ranker that keeps states and one that does not, and the bound of their precision."""
    place = int8_artifact if way[1] is Precision.INT8 else artifact
    with opened(place, *way) as kept, opened(place, *way, StateConfig(budget_mib=0)) as fresh:
        yield kept, fresh, BOUNDS[way[1]]


@pytest.fixture(scope="module")
def executor(pair: tuple[Ranker, Ranker, float]) -> Executor:
    """Of the one that keeps no states, beside those that serve: OpenVINO compiles for each anew."""
    return pair[1].backend.executor()


EVENTS = st.lists(st.tuples(st.sampled_from(ITEMS), st.sampled_from(DATASET.schema.event_types)), max_size=20)
CANDIDATES = st.lists(st.sampled_from(ITEMS), min_size=2, max_size=64).map(tuple)


def events_of(pairs: list[tuple[str, str]]) -> tuple[Event, ...]:
    """A history, an event a minute."""
    start = DATASET.schema.log_end - 10_000
    return tuple(Event(item, kind, start + 60 * number) for number, (item, kind) in enumerate(pairs))


@settings(max_examples=15, deadline=None)
@given(events=EVENTS, candidates=CANDIDATES, seen=st.integers(0, 20))
def test_kept_and_extended_states_score_as_fresh_ones(
    pair: tuple[Ranker, Ranker, float], events: list[tuple[str, str]], candidates: tuple[str, ...], seen: int
) -> None:
    kept, fresh, bound = pair
    history, now = events_of(events), DATASET.schema.log_end
    before = RankRequest("somebody", candidates, history=history[:seen], time=now)
    kept.rank(before)
    assert kept.rank(before).state == "cached"
    whole = RankRequest("somebody", candidates, history=history, time=now)
    scores, again, expected = kept.rank(whole), kept.rank(whole), fresh.rank(whole)
    assert (again.state, expected.state) == ("cached", "encoded")
    np.testing.assert_array_equal(again.scores, scores.scores)
    np.testing.assert_allclose(scores.scores, expected.scores, atol=bound)


@settings(max_examples=15, deadline=None)
@given(users=st.lists(st.sampled_from((*USERS, "somebody new")), min_size=2, max_size=5), data=st.data())
def test_users_in_one_call_score_as_one_by_one(
    pair: tuple[Ranker, Ranker, float], executor: Executor, users: list[str], data: st.DataObject
) -> None:
    ranker, bound = pair[1], pair[2]
    schema = ranker.schema
    rows = [ranker.catalogue.rows_of(data.draw(CANDIDATES)[:8]) for _ in users]
    states, calls = [], []
    for user, some in zip(users, rows, strict=True):
        history = ranker.features.stored_history(user) or ranker.features.stored_history(USERS[0])
        assert history is not None
        tokens = history_arrays(schema, ranker.features.items, history)
        arrays = {name: np.array(array) for name, array in executor.encode(tokens).items()}
        states.append(UserState(arrays, tuple(tokens["history_length"][0].tolist())))
        about = ranker.features.user_features(user)
        calls.append(candidate_arrays(schema, ranker.features.items, history, some, about, schema.log_end))
    alone = [executor.score([state], call)[0] for state, call in zip(states, calls, strict=True)]
    together = executor.score(states, {name: np.concatenate([call[name] for call in calls]) for name in calls[0]})
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other, one, atol=bound)


@settings(max_examples=15, deadline=None)
@given(user=st.sampled_from((*USERS, "somebody new")), candidates=CANDIDATES, cut=st.integers(1, 63))
def test_any_split_scores_as_the_whole(
    pair: tuple[Ranker, Ranker, float], user: str, candidates: tuple[str, ...], cut: int
) -> None:
    ranker, _, bound = pair
    cut = min(cut, len(candidates) - 1)
    parts = [ranker.rank(RankRequest(user, part)).scores for part in (candidates[:cut], candidates[cut:])]
    np.testing.assert_allclose(np.concatenate(parts), ranker.rank(RankRequest(user, candidates)).scores, atol=bound)


def test_all_ways_score_as_the_reference(artifact: str, pair: tuple[Ranker, Ranker, float]) -> None:
    with opened(artifact, "reference", Precision.FP32) as reference:
        for user in (*USERS[:8], "somebody new"):
            request = RankRequest(user, ITEMS[:50])
            np.testing.assert_allclose(pair[0].rank(request).scores, reference.rank(request).scores, atol=pair[2])


@pytest.mark.parametrize("storage", STORAGE_BOUNDS)
@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_every_storage_keeps_its_bound(artifact: str, target: str, storage: Storage) -> None:
    exact = worst = 0.0
    with (
        opened(artifact, target, Precision.FP32, StateConfig(storage=storage)) as kept,
        opened(artifact, target, Precision.FP32, StateConfig(budget_mib=0)) as fresh,
    ):
        for user in USERS[:20]:
            first, second = kept.rank(RankRequest(user, ITEMS)).scores, kept.rank(RankRequest(user, ITEMS)).scores
            expected: Float32Array = fresh.rank(RankRequest(user, ITEMS)).scores
            np.testing.assert_array_equal(first, second)  # the first request reads what later ones will read
            worst, exact = max(worst, float(np.abs(first - expected).max())), max(exact, float(np.abs(expected).max()))
    assert worst <= STORAGE_BOUNDS[storage]
    assert exact > 0.1  # or the bound would mean nothing


def test_a_precision_that_a_target_lacks_is_refused_at_load(artifact: str) -> None:
    with pytest.raises(ArtifactError, match="cannot be served by onnxruntime in bf16"):
        Ranker.load(artifact, EngineConfig(target="onnxruntime", precision=Precision.BF16))


def test_rooms_of_different_size_lie_side_by_side() -> None:
    from rankd.engine.backend import StateType
    from rankd.features.schema import TensorSpec

    specs = (TensorSpec("k", "float32", ("B", 2, "T", 1)), TensorSpec("n", "int32", ("B", 2)))

    def state(room: int, value: float) -> UserState:
        arrays = {"k": np.full((1, 2, room, 1), value, np.float32), "n": np.full((1, 2), room, np.int32)}
        return UserState(arrays, (room, room))

    side = SideBySide(specs, StateType.FP32)
    arrays = side.arrays([state(2, 1.0), state(4, 2.0)])
    assert arrays["k"][0, 0, :, 0].tolist()[:2] == [1.0, 1.0]
    assert arrays["k"][1, 1, :, 0].tolist() == [2.0] * 4
    assert arrays["n"].tolist() == [[2, 2], [4, 4]]
    one = state(4, 3.0)
    assert side.arrays([one])["k"] is one.arrays["k"]
