"""Assembly: shapes, padding, that the future and the padding change nothing, and nor does what a buffer held before."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.errors import InvalidRequest
from rankd.features.assembly import (
    appended_tokens,
    assemble,
    bucket_of,
    candidate_arrays,
    fill_candidates,
    fill_history,
    fill_item_columns,
    fill_request_columns,
    history_arrays,
    until,
    warm,
)
from rankd.features.schema import FeatureSchema, Numeric, Strategy, SubSequence, candidate_specs, history_specs
from rankd.features.staging import InputBuffers
from rankd.features.tables import ItemTable, UserFeatures
from rankd.types import Array, Int32Array
from tests.features.sample_schema import DAY, make_history, make_items, make_schema, make_user

ITEMS, SCHEMA, USER = make_items(), make_schema(), make_user()
ITEMS.categories[0] = (1, 5, 6)  # what pads is what row 0 says, be it what it may
REQUESTS = st.tuples(
    st.lists(st.integers(0, 31), max_size=20), st.lists(st.integers(0, 31), min_size=1, max_size=16), st.integers(0, 30)
)
BARE = msgspec.structs.replace(
    SCHEMA, item_categorical=(), item_numeric=(), user_categorical=(), event_values=(), match=(), match_events=()
)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """So that no example of Hypothesis is the one that compiles."""
    warm(SCHEMA, ITEMS)


def test_bucket_is_the_smallest_that_holds() -> None:
    assert [bucket_of(size, (3, 8)) for size in (0, 3, 4, 8, 9)] == [3, 3, 8, 8, 8]


@given(st.lists(st.integers(1, 31), max_size=20), st.integers(1, 16))
def test_arrays_fit_the_specs(rows: list[int], count: int) -> None:
    candidates = np.full(count, 5, np.int32)
    features = assemble(SCHEMA, ITEMS, make_history(rows), candidates, USER, 100 * DAY)
    sizes = {"B": 1, "T": features.history["history_item"].shape[2], "C": 4 if count <= 4 else 16}
    for specs, arrays in ((history_specs(SCHEMA), features.history), (candidate_specs(SCHEMA), features.candidates)):
        assert {spec.name for spec in specs} == set(arrays)
        for spec in specs:
            assert arrays[spec.name].dtype == spec.dtype
            assert arrays[spec.name].shape == tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)
    assert features.num_candidates == count
    assert features.history["history_length"][0, 0] == min(len(rows), SCHEMA.history_length)


def test_worked_example() -> None:
    features = assemble(SCHEMA, ITEMS, make_history([7, 3, 9]), np.asarray([4], np.int32), USER, 100 * DAY)
    assert features.history["history_item"][0].tolist() == [[7, 3, 9], [7, 3, 9]]
    assert features.history["history_length"].tolist() == [[3, 3]]
    assert features.history["history_time"][0, 0].tolist() == [DAY, 2 * DAY, 3 * DAY]
    assert features.candidates["candidate_item"].tolist() == [[4, 0, 0, 0]]
    assert features.candidates["context_categories"].tolist() == [[2]]


@given(st.integers(0, 6))
def test_events_after_the_moment_do_not_exist(day: int) -> None:
    whole, candidates = make_history([7, 3, 9, 3, 5]), np.asarray([3, 9], np.int32)
    past = whole.until(min(day, 5))
    now = assemble(SCHEMA, ITEMS, whole, candidates, USER, day * DAY)
    then = assemble(SCHEMA, ITEMS, past, candidates, USER, day * DAY)
    for name, array in {**now.history, **now.candidates}.items():
        np.testing.assert_array_equal(array, {**then.history, **then.candidates}[name])


@pytest.mark.parametrize("count", [0, 17])
def test_a_list_that_fits_no_bucket_is_refused(count: int) -> None:
    with pytest.raises(InvalidRequest, match="allowed are 1 to 16"):
        assemble(SCHEMA, ITEMS, make_history([]), np.zeros(count, np.int32), USER, 0)


def same(left: Mapping[str, Array], right: Mapping[str, Array]) -> None:
    assert list(left) == list(right)
    for name, array in left.items():
        assert array.dtype == right[name].dtype
        np.testing.assert_array_equal(array, right[name], err_msg=name)


def rows_of(candidates: list[int]) -> Int32Array:
    return np.asarray(candidates, np.int32)


@pytest.mark.parametrize("schema", [SCHEMA, BARE])
@given(requests=st.lists(REQUESTS, min_size=1, max_size=6), dirt=st.integers(0, 255))
def test_used_buffers_equal_new_arrays(
    schema: FeatureSchema, requests: list[tuple[list[int], list[int], int]], dirt: int
) -> None:
    buffers = InputBuffers(schema, {})
    for size in schema.candidate_buckets:
        buffers.candidates(size).block.memory[...] = dirt
    for size in schema.history_buckets:
        buffers.history(size).memory[...] = dirt
    for rows, candidates, day in requests:
        now = day * DAY
        history = until(make_history(rows), now)
        into = buffers.candidates(bucket_of(len(candidates), schema.candidate_buckets)).row(0)
        fill_candidates(schema, ITEMS, history, rows_of(candidates), USER, now, into)
        same(into, candidate_arrays(schema, ITEMS, history, rows_of(candidates), USER, now))
        same(fill_history(schema, ITEMS, history, buffers), history_arrays(schema, ITEMS, history))


def test_what_pads() -> None:
    arrays = candidate_arrays(SCHEMA, ITEMS, make_history([7]), rows_of([4, 7, 5]), USER, 9 * DAY)
    assert arrays["candidate_item"].tolist() == [[4, 7, 5, 0]]
    assert arrays["candidate_categories"][0].tolist() == ITEMS.categories[[4, 7, 5, 0]].tolist()
    assert arrays["candidate_numeric"][0, 3].tolist() == [0.0] * 9
    np.testing.assert_array_equal(arrays["candidate_numeric"][0, :3, 0], ITEMS.numeric[[4, 7, 5], 0])
    assert arrays["candidate_numeric"][0, :3, 1].tolist() == [0.0, 1.0, 0.0]  # seen


def test_times_outside_of_int32_are_clipped() -> None:
    history = make_history([7, 3], times=[-(2**40), 2**39])
    arrays = assemble(SCHEMA, ITEMS, history, rows_of([4]), USER, 2**40)
    assert arrays.history["history_time"][0, 0].tolist() == [-(2**31), 2**31 - 1, 0]
    assert arrays.candidates["context_time"].tolist() == [2**31 - 1]


@given(st.lists(REQUESTS, min_size=3, max_size=3))
def test_users_side_by_side_in_one_buffer(requests: list[tuple[list[int], list[int], int]]) -> None:
    buffers = InputBuffers(SCHEMA, {16: 3}).candidates(16)
    alone = []
    for user in (2, 0, 1):
        rows, candidates, day = requests[user]
        whole = rows_of((candidates * 16)[:16])
        history = until(make_history(rows), day * DAY)
        fill_candidates(SCHEMA, ITEMS, history, whole, USER, day * DAY, buffers.row(user))
        alone.append((user, candidate_arrays(SCHEMA, ITEMS, history, whole, USER, day * DAY)))
    for user, expected in alone:
        same(buffers.call(user, 1), expected)
        same({name: array[user : user + 1] for name, array in buffers.call(0, 3).items()}, expected)


def test_fresher_values_over_the_items_own() -> None:
    """What a feature store does: defaults first, its rows over them; the columns of the request do not touch them."""
    whole = InputBuffers(SCHEMA, {}).candidates(4).row(0)
    candidates, history = rows_of([4, 7]), make_history([7, 7])
    fill_item_columns(SCHEMA, ITEMS, candidates, whole)
    whole["candidate_numeric"][0, 1, 0] = 42.0
    whole["candidate_categories"][0, 1] = 3
    fill_request_columns(SCHEMA, ITEMS, history, candidates, USER, 9 * DAY, whole)
    expected = candidate_arrays(SCHEMA, ITEMS, history, candidates, USER, 9 * DAY)
    expected["candidate_numeric"][0, 1, 0] = 42.0
    expected["candidate_categories"][0, 1] = 3
    same(whole, expected)


def test_numeric_features_of_users_and_items_without_match_features() -> None:
    schema = msgspec.structs.replace(SCHEMA, match=(), user_numeric=(Numeric("age"),))
    user = UserFeatures(np.asarray([2], np.int32), np.asarray([0.5], np.float32))
    arrays = candidate_arrays(schema, ITEMS, make_history([7]), rows_of([4]), user, 9 * DAY)
    assert arrays["context_numeric"].tolist() == [[0.5]]
    np.testing.assert_array_equal(arrays["candidate_numeric"][0, :, 0], [ITEMS.numeric[4, 0], 0, 0, 0])


def test_more_candidates_than_room_are_refused() -> None:
    into = InputBuffers(SCHEMA, {}).candidates(4).row(0)
    for fill in (
        fill_item_columns,
        lambda *a: fill_request_columns(a[0], a[1], make_history([7]), a[2], USER, 0, a[3]),
    ):
        with pytest.raises(ValueError, match="shape"):
            fill(SCHEMA, ITEMS, rows_of([5] * 5), into)


@given(st.lists(st.integers(2, 31), max_size=12), st.integers(0, 6))
def test_appended_tokens_of_buffers(rows: list[int], new: int) -> None:
    buffers = InputBuffers(SCHEMA, {})
    fill_history(SCHEMA, ITEMS, make_history(list(range(2, 22))), buffers)
    history = make_history(rows)
    lengths = [max(n - new, 0) for n in history_arrays(SCHEMA, ITEMS, history)["history_length"][0].tolist()]
    from_buffers = appended_tokens(fill_history(SCHEMA, ITEMS, history, buffers), lengths, (2, 8))
    same(from_buffers, appended_tokens(history_arrays(SCHEMA, ITEMS, history), lengths, (2, 8)))
    assert not any(np.shares_memory(a, b) for a in from_buffers.values() for b in buffers.history(8).arrays.values())


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that a call holds at once beyond what was held before; NumPy reports to tracemalloc."""
    call()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def many_items(num_rows: int = 1000) -> ItemTable:
    return replace(
        ITEMS,
        categories=np.resize(ITEMS.categories, (num_rows, 3)),
        numeric=np.resize(ITEMS.numeric, (num_rows, 1)),
        neighbours=np.resize(ITEMS.neighbours, (num_rows, 5)),
        similarities=np.resize(ITEMS.similarities, (num_rows, 5)),
    )


def test_filling_candidates_allocates_nothing_that_grows() -> None:
    schema, items = msgspec.structs.replace(SCHEMA, candidate_buckets=(512,)), many_items()
    into = InputBuffers(schema, {}).candidates(512).row(0)
    long = make_history(list(range(2, 1002)))

    def peak(count: int, events: int) -> int:
        history = long.last(events)
        candidates = np.arange(count, dtype=np.int32)
        return peak_bytes(lambda: fill_candidates(schema, items, history, candidates, USER, 2000 * DAY, into))

    assert abs(peak(512, 1000) - peak(16, 1000)) < 2048
    assert abs(peak(512, 1000) - peak(512, 2)) < 2048


@pytest.mark.parametrize("strategy", list(Strategy))
def test_filling_a_history_allocates_no_more_than_extraction_needs(strategy: Strategy) -> None:
    part = SubSequence(strategy, events=("view",), column="genre")
    schema, items = make_schema(part), many_items()
    buffers = InputBuffers(schema, {})

    def peak(events: int) -> int:
        history = make_history(list(range(2, 2 + events)) if events else [])
        return peak_bytes(lambda: fill_history(schema, items, history, buffers))

    bounded = 128 * schema.stored_history if strategy is not Strategy.RECENT else 2048
    assert peak(schema.stored_history - 2) - peak(0) < bounded
