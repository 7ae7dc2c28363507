"""Extraction strategies, each against its plain definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.features.history import extract
from rankd.features.schema import Strategy, SubSequence
from tests.features.sample_schema import make_history, make_items, make_schema

ITEMS = make_items()
ROWS = st.lists(st.integers(1, 31), max_size=30)


def picked(rows: list[int], part: SubSequence, events: list[int] | None = None) -> list[int]:
    indices: list[int] = extract(make_history(rows, events), part, make_schema(), ITEMS.categories).tolist()
    return indices


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [(Strategy.RECENT, [0, 1, 2, 3, 4]), (Strategy.DISTINCT, [2, 3, 4]), (Strategy.REPEATED, [2, 4])],
)
def test_worked_example(strategy: Strategy, expected: list[int]) -> None:
    assert picked([7, 3, 7, 9, 3], SubSequence(strategy)) == expected


@given(ROWS)
def test_distinct_is_the_newest_event_of_each_item(rows: list[int]) -> None:
    expected = sorted({row: index for index, row in enumerate(rows)}.values())[-8:]
    assert picked(rows, SubSequence(Strategy.DISTINCT)) == expected


@given(ROWS)
def test_repeated_is_the_newest_event_of_each_item_that_came_twice(rows: list[int]) -> None:
    newest = {row: index for index, row in enumerate(rows)}
    expected = sorted(index for row, index in newest.items() if rows.count(row) > 1)[-8:]
    assert picked(rows, SubSequence(Strategy.REPEATED)) == expected


@given(st.lists(st.tuples(st.integers(2, 31), st.integers(0, 1)), max_size=30))
def test_event_keeps_the_given_types(pairs: list[tuple[int, int]]) -> None:
    rows, events = [row for row, _ in pairs], [event for _, event in pairs]
    expected = [index for index, event in enumerate(events) if event == 0][-8:]
    assert picked(rows, SubSequence(Strategy.EVENT, events=("like",)), events) == expected


@given(ROWS)
def test_category_keeps_the_users_own_favourites(rows: list[int]) -> None:
    genres = ITEMS.categories[:, 0]
    result = picked(rows, SubSequence(Strategy.CATEGORY, column="genre", top=1))
    seen = [int(genres[row]) for row in rows if genres[row] > 0]
    if not seen:
        assert result == []
        return
    favourite = {int(genres[rows[index]]) for index in result}
    assert len(favourite) == 1
    assert seen.count(favourite.pop()) == max(seen.count(genre) for genre in seen)


@given(ROWS, st.sampled_from([Strategy.RECENT, Strategy.DISTINCT, Strategy.REPEATED]))
def test_indices_ascend_and_fit(rows: list[int], strategy: Strategy) -> None:
    result = picked(rows, SubSequence(strategy))
    assert len(result) <= 8
    assert bool(np.all(np.diff(result) > 0))
