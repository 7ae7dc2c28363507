"""The budget for hot rows goes where it saves the most look-ups."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from rankd.plan.hot_rows import spend_on_hot_rows
from rankd.plan.table_plan import HotRows
from rankd.plan.table_statistics import TableLoad, hot_share
from tests.plan.made_up import load_of, some_loads


def saved(loads: list[TableLoad], rows: dict[str, int]) -> float:
    return sum(load.statistics.lookups * hot_share(load, rows.get(load.name, 0)) for load in loads)


@given(some_loads(), st.integers(0, 1_000_000))
def test_the_budget_is_kept(loads: list[TableLoad], budget: int) -> None:
    specs = {load.name: load.spec for load in loads}
    taken = spend_on_hot_rows(loads, budget)
    assert sum(hot.rows * specs[hot.table].row_bytes for hot in taken) <= budget
    assert all(1 <= hot.rows <= specs[hot.table].rows for hot in taken)


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 1)), min_size=2, max_size=3), st.integers(0, 24))
def test_no_other_spending_saves_more(asked: list[tuple[float, float]], rows: int) -> None:
    """Tables of 10 rows of equal size, the first of which takes at least a tenth: the curves are concave."""
    loads = [
        load_of(f"t{number}", 10, lookups=lookups, hot=(0, 0, 0, share))
        for number, (lookups, share) in enumerate(asked)
    ]
    taken = {hot.table: hot.rows for hot in spend_on_hot_rows(loads, rows * loads[0].spec.row_bytes)}
    best = max(
        saved(loads, dict(zip([load.name for load in loads], counts, strict=True)))
        for counts in product(range(11), repeat=len(loads))
        if sum(counts) <= rows
    )
    assert saved(loads, taken) >= best - 1e-9


def test_rows_that_nobody_asks_for_are_not_cached() -> None:
    asked, idle = load_of("asked", 100), load_of("idle", 100, lookups=0.0)
    assert spend_on_hot_rows([asked, idle], 10**9) == (HotRows("asked", 100),)
