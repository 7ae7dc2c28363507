"""Match features against a slow definition written from their docstring."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rankd.features.matching import match_features
from rankd.features.schema import MATCH_FEATURES
from tests.features.sample_schema import DAY, make_history, make_items, make_schema

ITEMS, SCHEMA = make_items(), make_schema()


def slow(rows: list[int], events: list[int], days: list[float], candidate: int) -> dict[str, float]:
    """Every match feature of one candidate, from the words of `matching.py`."""
    h = [(row, age) for row, event, age in zip(rows, events, days, strict=True) if event == 1 and row >= 2]
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


@given(
    st.lists(st.tuples(st.integers(1, 31), st.integers(0, 1), st.integers(0, 200)), max_size=25),
    st.lists(st.integers(0, 31), min_size=1, max_size=10),
)
def test_equals_the_slow_definition(events: list[tuple[int, int, int]], candidates: list[int]) -> None:
    events = sorted(events, key=lambda event: -event[2])
    rows, kinds, ages = ([event[part] for event in events] for part in range(3))
    now = 300 * DAY
    history = make_history(rows, kinds, [now - age * DAY for age in ages])
    fast = match_features(history, np.asarray(candidates, np.int32), now, ITEMS, SCHEMA)
    for line, candidate in zip(fast, candidates, strict=True):
        expected = slow(rows, kinds, [float(age) for age in ages], candidate)
        np.testing.assert_allclose(line, [expected[name] for name in MATCH_FEATURES], rtol=1e-4, atol=1e-5)
