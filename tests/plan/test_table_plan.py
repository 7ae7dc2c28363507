"""A plan is right if every row is somewhere once and limits are kept; what is wrong is named."""

from __future__ import annotations

import msgspec
import pytest

from rankd.embeddings.table_spec import TablePart, TableSpec
from rankd.errors import ConfigError
from rankd.plan.table_plan import HotRows, MemoryLimits, Plan, Shard, Strategy, check_plan

A, B, C = TableSpec("a", 10, 4), TableSpec("b", 4, 4), TableSpec("c", 2, 4)  # 160, 64 and 32 bytes
EVEN, ODD = TablePart("a", 2, 0), TablePart("a", 2, 1)
GOOD = Plan(
    strategy=Strategy.CAPACITY_BALANCED,
    tables=(A, B, C),
    shards=(Shard((EVEN, TablePart("b"))), Shard((ODD,))),
    replicated=("c",),
    hot_rows=(HotRows("a", 1),),
    limits=MemoryLimits(144, 48, hot_row_bytes=16),
)


def changed(**fields: object) -> Plan:
    return msgspec.structs.replace(GOOD, **fields)


def test_the_worked_example_is_right() -> None:
    check_plan(GOOD, "plan")
    assert GOOD.shard_bytes == (144, 80)
    assert GOOD.main_bytes == 32 + 16


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (changed(tables=(A, B, C, A)), "'a' is declared twice"),
        (
            changed(shards=(Shard((EVEN, TablePart("b"))), Shard((ODD, TablePart("aa"))))),
            "shard 1: there is no table 'aa'",
        ),
        (changed(replicated=("d",)), "replicated: there is no table 'd'"),
        (changed(hot_rows=(HotRows("d", 1),)), "hot_rows: there is no table 'd'"),
        (changed(hot_rows=(HotRows("c", 1),)), "'c' is there twice, or is replicated"),
        (changed(hot_rows=(HotRows("a", 1), HotRows("a", 2))), "'a' is there twice"),
        (changed(hot_rows=(HotRows("a", 11),)), "11 rows of 'a', which has 10"),
        (changed(replicated=()), r"nobody has table 'c' \(2 rows\)"),
        (changed(replicated=("c", "c")), "replicated 2 times"),
        (changed(replicated=("c", "b")), "'b' is replicated and in shards 0"),
        (changed(shards=(Shard((EVEN, TablePart("b"))),)), "remainder 1 by modulus 2"),
        (
            changed(shards=(Shard((EVEN, TablePart("b"))), Shard((EVEN,)))),
            "shard 1: remainder 0 of table 'a' is in shard 0",
        ),
        (changed(shards=(Shard((EVEN, ODD, TablePart("b"))),)), "shard 0: remainder 1 .* another part"),
        (
            changed(shards=(Shard((EVEN, TablePart("b"))), Shard((TablePart("a", 3, 1),)))),
            "by 2 in shard 0 and by 3 in shard 1",
        ),
        (changed(shards=(Shard((EVEN, TablePart("b"))), Shard((TablePart("a", 2, 2),)))), "no rows with remainder 2"),
        (changed(limits=MemoryLimits(hot_row_bytes=15)), "the cache of hot rows needs 16 B"),
        (changed(limits=MemoryLimits(143, hot_row_bytes=16)), r"shard 0 needs 144 B \(144 bytes\), and 143 B"),
        (changed(limits=MemoryLimits(None, 47, hot_row_bytes=16)), "the main process needs 48 B"),
    ],
)
def test_what_is_wrong_is_named(plan: Plan, message: str) -> None:
    with pytest.raises(ConfigError, match=f"plan: .*{message}"):
        check_plan(plan, "plan")


def test_a_table_of_fewer_rows_than_its_modulus_has_no_empty_parts() -> None:
    two = (Shard((TablePart("c", 3, 0),)), Shard((TablePart("c", 3, 1),)))
    check_plan(Plan(Strategy.LOAD_BALANCED, (C,), two, (), (), MemoryLimits()), "plan")
    three = (*two, Shard((TablePart("c", 3, 2),)))
    with pytest.raises(ConfigError, match="no rows with remainder 2"):
        check_plan(Plan(Strategy.LOAD_BALANCED, (C,), three, (), (), MemoryLimits()), "plan")
