"""The best option is the best, and its reason has the numbers of it and of the next."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd.embeddings.table_spec import TableStorage
from rankd.errors import ConfigError
from rankd.plan.choice import ALIKE, Option, choose
from rankd.plan.cost_model import CostModel, LookupCost
from rankd.plan.declaration import loads_of, read_declaration
from rankd.plan.table_plan import MemoryLimits, Strategy
from rankd.plan.table_statistics import TableLoad
from tests.plan.made_up import FREE, ROOMY, some_loads

DLRM = loads_of(read_declaration("dlrm-v2"))
LIMITS = MemoryLimits(32 * 1024**3, 32 * 1024**3)


def test_the_lowest_p99_is_chosen_and_the_next_is_named() -> None:
    choice = choose(DLRM, Strategy, range(4, 7), LIMITS, CostModel())
    ranked = sorted(choice.options, key=lambda option: option.p99_ms)
    near = [option for option in ranked if option.p99_ms <= ALIKE * ranked[0].p99_ms]
    assert choice.best in near
    assert choice.best.prediction.cores == min(option.prediction.cores for option in near)
    assert len(choice.options) == 9
    assert choice.reason.startswith(f"{choice.best.title}: ")
    assert f"p99 {choice.best.p99_ms:,.2f} ms" in choice.reason
    assert any(f"Next is {option.title}, p99 {option.p99_ms:,.2f} ms" in choice.reason for option in ranked)
    assert [text.split()[0] for text in choice.refused] == ["singular", "one-shard"]


def test_under_a_bound_the_fewest_cores_are_chosen() -> None:
    slow_rows = CostModel(lookups={TableStorage.FP32: LookupCost(0.5)}, rate=20.0)
    quickest = choose(DLRM, Strategy, range(4, 7), LIMITS, slow_rows).best
    slower = choose(DLRM, Strategy, range(4, 7), LIMITS, slow_rows, bound_ms=100.0)
    assert slower.best.prediction.cores == 5 * 8 < quickest.prediction.cores
    assert quickest.p99_ms < slower.best.p99_ms <= 100.0
    assert "the fewest cores with a p99 of at most 100.0 ms" in slower.reason


def test_of_plans_that_are_alike_the_cheaper_one_is_taken() -> None:
    """Without look-ups and calls that cost anything, all shards are as quick: two servers do."""
    costs = msgspec.structs.replace(FREE, dense_us=1000.0, rate=10.0)
    choice = choose(DLRM, (Strategy.LOAD_BALANCED,), range(1, 7), ROOMY, costs)
    assert choice.best.prediction.cores == 2


def test_everything_in_one_process_needs_the_fewest_cores_where_it_fits() -> None:
    choice = choose(DLRM, Strategy, range(1, 5), MemoryLimits(), CostModel(), bound_ms=100.0)
    assert choice.best.plan.strategy is Strategy.SINGULAR


@settings(deadline=None)  # up to 14 predictions
@given(some_loads(), st.integers(1, 4), st.none() | st.floats(1, 100))
def test_no_option_is_better(loads: list[TableLoad], most: int, bound_ms: float | None) -> None:
    costs = msgspec.structs.replace(CostModel(), rate=1.0)
    try:
        choice = choose(loads, Strategy, range(1, most + 1), ROOMY, costs, bound_ms)
    except ConfigError as error:
        assert "nothing keeps a p99" in str(error)  # noqa: PT017
        return
    for option in choice.options:
        if bound_ms is None:
            assert option.p99_ms * ALIKE >= choice.best.p99_ms
            if option.p99_ms <= choice.best.p99_ms:
                assert option.prediction.cores >= choice.best.prediction.cores
        elif option.p99_ms <= bound_ms:
            assert cost_of(option) >= cost_of(choice.best)


def cost_of(option: Option) -> tuple[int, float]:
    return option.prediction.cores, option.p99_ms


def test_what_cannot_be_is_refused_with_numbers() -> None:
    with pytest.raises(ConfigError, match=r"nothing fits: singular needs 97.4 GiB .* 10.0 GiB"):
        choose(DLRM, Strategy, [2], MemoryLimits(10 * 1024**3, 10 * 1024**3), CostModel())
    with pytest.raises(ConfigError, match=r"nothing keeps up with 1,000 requests a second: .* \d\d\d% busy"):
        choose(DLRM, Strategy, [2], MemoryLimits(), msgspec.structs.replace(CostModel(), rate=1000.0))
    with pytest.raises(ConfigError, match=r"nothing keeps a p99 of 1.0 ms: the quickest is singular with 2"):
        choose(DLRM, Strategy, [2], MemoryLimits(), CostModel(), bound_ms=1.0)


def test_who_cannot_keep_up_comes_last() -> None:
    """At 430 requests a second the main server cannot also look up rows for all of them."""
    costs = msgspec.structs.replace(CostModel(), rate=430.0)
    choice = choose(DLRM, (Strategy.SINGULAR, Strategy.LOAD_BALANCED), [8], MemoryLimits(), costs)
    assert choice.best.plan.strategy is Strategy.LOAD_BALANCED
    assert choice.options[0].p99_ms == math.inf
    assert "which cannot keep up" in choice.reason
