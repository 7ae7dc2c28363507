"""Extraction strategies, each against its plain definition."""

from __future__ import annotations

import msgspec
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


WINDOWED = [SubSequence(Strategy.RECENT), SubSequence(Strategy.EVENT, events=("like",))]


@pytest.mark.parametrize("part", WINDOWED)
@given(rows=st.lists(st.integers(1, 31), min_size=1, max_size=60), step=st.integers(1, 8), data=st.data())
def test_the_window_moves_in_steps_whatever_the_store_has_dropped(
    part: SubSequence, rows: list[int], step: int, data: st.DataObject
) -> None:
    """What is read after each event: at most `history_length`, the same for a store that forgets old events, and a
    continuation of what was read before, except at a step."""
    kinds = data.draw(st.lists(st.integers(0, 1), min_size=len(rows), max_size=len(rows)))
    schema = msgspec.structs.replace(make_schema(), window_step=step)
    whole = make_history(rows, kinds)
    kept = 0
    before: list[int] = []
    for count in range(1, len(rows) + 1):
        history = whole.until(count)
        read = extract(history, part, schema, ITEMS.categories)
        assert len(read) <= schema.history_length
        short = history.last(40)  # a store keeps more than a window; what it drops is never read again
        again = extract(short, part, schema, ITEMS.categories) + short.dropped
        if part.strategy is Strategy.RECENT:
            assert again.tolist() == read.tolist()
            assert len(read) > min(count, schema.history_length) - step
        else:
            assert read[-len(again) :].tolist() == again.tolist() or len(again) == 0
        kept += read[: len(before)].tolist() == before
        before = read.tolist()
    slides = len(rows) - kept
    assert slides <= len(rows) // step + 1


def test_a_step_of_one_reads_the_newest_events() -> None:
    rows = list(range(1, 21))
    assert picked(rows, SubSequence(Strategy.RECENT)) == list(range(12, 20))


def test_worked_example_of_steps() -> None:
    schema = msgspec.structs.replace(make_schema(), window_step=4)
    sizes = []
    for count in range(6, 18):
        read = extract(make_history(list(range(1, count + 1))), SubSequence(Strategy.RECENT), schema, ITEMS.categories)
        sizes.append((count, int(read[0]), len(read)))
    assert sizes == [
        (6, 0, 6), (7, 0, 7), (8, 0, 8), (9, 4, 5), (10, 4, 6), (11, 4, 7), (12, 4, 8), (13, 8, 5), (14, 8, 6),
        (15, 8, 7), (16, 8, 8), (17, 12, 5),
    ]  # fmt: skip
