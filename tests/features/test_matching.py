"""Match features: the compiled loops against a plain NumPy reference, and that against the words of the docstring."""

from __future__ import annotations

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.features.matching import fill_match_features, kernels
from rankd.features.schema import FIRST_ITEM_ROW, MATCH_FEATURES, FeatureSchema
from rankd.features.tables import ItemTable
from rankd.types import Array, Float32Array, Int32Array, UserHistory
from tests.features.sample_schema import DAY, make_history, make_items, make_schema

ITEMS, SCHEMA, NOW = make_items(), make_schema(), 300 * DAY
CANDIDATES = st.lists(st.integers(0, 31), min_size=1, max_size=10)
SCHEMAS = st.builds(
    lambda match, events: msgspec.structs.replace(SCHEMA, match=tuple(match), match_events=events),
    st.lists(st.sampled_from(MATCH_FEATURES), unique=True),
    st.sampled_from([(), ("like",), ("view",), ("like", "view")]),
)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """So that no example of Hypothesis is the one that compiles."""
    kernels()


@st.composite
def histories(draw: st.DrawFn, min_row: int = 0) -> UserHistory:
    """Any rows and event types; times ascend, often repeat, and may lie after NOW."""
    events = draw(st.lists(st.tuples(st.integers(min_row, 31), st.integers(0, 1)), max_size=40))
    days = sorted(draw(st.lists(st.integers(-20_000, 310), min_size=len(events), max_size=len(events))))
    shift = draw(st.sampled_from([0, 1, 3_601]))
    rows, kinds = [row for row, _ in events], [kind for _, kind in events]
    return make_history(rows, kinds, [day * DAY + shift for day in days])


def reference(
    schema: FeatureSchema, items: ItemTable, history: UserHistory, candidates: Int32Array, now: int
) -> Float32Array:
    """(C, M) float32 in plain NumPy: sort the distinct items of h, look the candidates up, weigh their neighbours."""
    result = np.zeros((candidates.shape[0], len(schema.match)), np.float32)
    wanted = np.asarray([name in (schema.match_events or schema.event_types) for name in schema.event_types])
    keep = (history.rows >= FIRST_ITEM_ROW) & wanted[history.events]
    rows, times = history.rows[keep], history.times[keep]
    if rows.shape[0] == 0:
        return result
    order = np.argsort(rows, kind="stable")  # stable: within an item the events stay oldest first
    days = np.maximum((now - times[order]) / DAY, 0.0).astype(np.float32)
    distinct, first, counts = np.unique(rows[order], return_index=True, return_counts=True)
    oldest, newest = days[first], days[first + counts - 1]
    gap = (oldest - newest) / np.maximum(counts - 1, 1)
    own = {
        "seen": np.ones(len(distinct)),
        "count": np.log1p(counts),
        "recency": np.log1p(newest),
        "cadence": np.where(counts > 1, np.log1p(newest / np.maximum(gap, 1.0)), 0.0),
    }
    weights = {"affinity": np.ones(len(distinct)), "recent_affinity": np.exp(-newest / 30.0)}
    of_user = {"events": float(counts.sum()), "idle": float(newest.min())}
    position = np.minimum(np.searchsorted(distinct, candidates), len(distinct) - 1)
    hit = distinct[position] == candidates
    for column, name in enumerate(schema.match):
        if name in own:
            result[:, column] = np.where(hit, own[name][position], 0.0)
        elif name in of_user:
            result[:, column] = math.log1p(of_user[name])
        else:
            of_row = np.zeros(items.neighbours.shape[0])
            of_row[distinct] = weights[name]
            near = of_row[items.neighbours[candidates]] * items.similarities[candidates]
            result[:, column] = np.log1p(near.sum(axis=1))
    return result


def filled(
    history: UserHistory, candidates: list[int], schema: FeatureSchema = SCHEMA, items: ItemTable = ITEMS
) -> Float32Array:
    """What the kernels write into columns that lie apart, among others that must stay as they are."""
    whole = np.full((len(candidates) + 2, 2 * len(schema.match) + 3), 7.0, np.float32)
    into = whole[1:-1, 2:-1:2]
    fill_match_features(schema, items, history, np.asarray(candidates, np.int32), NOW, into)
    result = into.copy()
    into[...] = 7.0
    assert (whole == 7.0).all()
    return result


@given(histories(), CANDIDATES, SCHEMAS)
def test_equals_the_reference(history: UserHistory, candidates: list[int], schema: FeatureSchema) -> None:
    expected = reference(schema, ITEMS, history, np.asarray(candidates, np.int32), NOW)
    np.testing.assert_allclose(filled(history, candidates, schema), expected, rtol=1e-6, atol=1e-6)


def test_equals_the_reference_at_the_size_of_a_real_request() -> None:
    random = np.random.default_rng(0)
    rows, width, events = 20_000, 32, 1000
    items = ItemTable(
        np.zeros((rows, 0), np.int32),
        np.zeros((rows, 0), np.float32),
        random.integers(0, rows, (rows, width)).astype(np.int32),
        random.random((rows, width)).astype(np.float32),
    )
    seen = random.integers(0, rows, events) // random.choice([1, 10, 1000], events)
    times = np.sort(NOW - random.integers(0, 250 * DAY, events))
    history = make_history(seen.tolist(), random.integers(0, 2, events).tolist(), times.tolist())
    candidates = np.concatenate([history.rows[::4], random.integers(0, rows, 262)]).astype(np.int32)
    expected = reference(SCHEMA, items, history, candidates, NOW)
    result = filled(history, candidates.tolist(), items=items)
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)
    assert (result != 0).any(axis=0).all()


def slow(history: UserHistory, candidate: int) -> dict[str, float]:
    """Every match feature of one candidate, from the words of `matching.py`."""
    columns = (column.tolist() for column in (history.rows, history.events, history.times))
    h = [(row, (NOW - time) / DAY) for row, event, time in zip(*columns, strict=True) if event == 1 and row >= 2]
    mine = [age for row, age in h if row == candidate]
    newest = dict(h)
    pairs = dict.fromkeys(newest, 0.0)
    for row, similarity in zip(ITEMS.neighbours[candidate], ITEMS.similarities[candidate], strict=True):
        if int(row) in pairs:
            pairs[int(row)] += float(similarity)
    gap = (mine[0] - mine[-1]) / (len(mine) - 1) if len(mine) > 1 else 0.0
    return {
        "seen": float(bool(mine)),
        "count": math.log1p(len(mine)),
        "recency": math.log1p(mine[-1]) if mine else 0.0,
        "cadence": math.log1p(mine[-1] / max(gap, 1.0)) if len(mine) > 1 else 0.0,
        "affinity": math.log1p(sum(pairs.values())),
        "recent_affinity": math.log1p(sum(s * math.exp(-newest[row] / 30.0) for row, s in pairs.items())),
        "events": math.log1p(len(h)),
        "idle": math.log1p(min(age for _, age in h)) if h else 0.0,
    }


@given(histories(min_row=1), CANDIDATES)
def test_equals_the_slow_definition(history: UserHistory, candidates: list[int]) -> None:
    past = history.until(int(np.searchsorted(history.times, NOW, side="right")))
    for line, candidate in zip(filled(past, candidates), candidates, strict=True):
        expected = slow(past, candidate)
        np.testing.assert_allclose(line, [expected[name] for name in MATCH_FEATURES], rtol=1e-4, atol=1e-5)


def test_worked_example_of_the_hash_table() -> None:
    slots, seen = np.full((2, 16), 5, np.int32), np.zeros(3, kernels().SEEN)
    history = make_history([7, 3, 7], times=[10, 20, 30])
    places = kernels().note_seen(history.rows, history.events, history.times, np.ones(2, bool), slots, seen)
    assert {slot: int(slots[0, slot]) for slot in np.flatnonzero(slots[0])} == {4: 7, 13: 3}
    assert (int(slots[1, 4]), int(slots[1, 13])) == (0, 1)
    assert seen[:places].tolist() == [(2, 10, 30, -1.0), (1, 20, 20, -1.0)]


def test_the_kernels_know_every_match_feature() -> None:
    assert set(kernels().ORDER) == set(MATCH_FEATURES)


def test_a_history_longer_than_stored_ones() -> None:
    history = make_history(list(range(2, 32)) * 50, times=list(range(0, 1500 * 3600, 3600)))
    assert len(history) > SCHEMA.stored_history
    candidates = list(range(32))
    expected = reference(SCHEMA, ITEMS, history, np.asarray(candidates, np.int32), NOW)
    np.testing.assert_allclose(filled(history, candidates), expected, rtol=1e-6, atol=1e-6)


def test_tables_and_histories_as_they_may_lie_in_memory() -> None:
    history = make_history([7, 3, 7, 9])
    expected = filled(history, [3, 7, 9, 10])
    parts = (ITEMS.categories, ITEMS.numeric, ITEMS.neighbours, ITEMS.similarities)
    turned = [np.asfortranarray(part) for part in parts]
    packed = [np.zeros(part.nbytes + 1, np.uint8)[1:].view(part.dtype).reshape(part.shape) for part in parts]
    for source, part in zip(parts, packed, strict=True):
        part[...] = source
    every: list[Array] = [*turned, *packed, history.rows, history.events, history.times]
    for array in every:
        array.flags.writeable = False
    for tables in (turned, packed):
        np.testing.assert_array_equal(filled(history, [3, 7, 9, 10], items=ItemTable(*tables)), expected)


def test_threads_do_not_share_memory() -> None:
    cases = [(make_history([2 + seed, 3, 2 + seed] * (seed + 1)), [2 + seed, 3, 4]) for seed in range(8)]
    expected = [filled(*case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda case: filled(*case), cases * 50))
    for number, result in enumerate(results):
        np.testing.assert_array_equal(result, expected[number % len(cases)])


@pytest.mark.parametrize("row", [-1, 32])
def test_a_row_that_the_table_does_not_have_is_refused(row: int) -> None:
    with pytest.raises(IndexError, match="outside the item table"):
        filled(make_history([7]), [3, row])


def test_an_output_of_another_shape_is_refused() -> None:
    into = np.zeros((2, len(MATCH_FEATURES)), np.float32)
    with pytest.raises(ValueError, match=r"\(2, 8\) cannot take \(3, 8\)"):
        fill_match_features(SCHEMA, ITEMS, make_history([7]), np.asarray([3, 4, 5], np.int32), NOW, into)


def test_imports_do_not_compile() -> None:
    code = "import sys, rankd.features.assembly; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
