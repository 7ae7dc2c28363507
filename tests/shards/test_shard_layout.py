"""Layouts: what each shard serves, where each row is, and which layouts are refused."""

from __future__ import annotations

import msgspec
import pytest

from rankd.embeddings.table_spec import TablePart, TableSpec
from rankd.errors import ConfigError
from rankd.shards.routing import Router
from rankd.shards.shard_layout import Net, ServedNet, ServedPart, Shard, ShardLayout


def test_the_worked_example() -> None:
    tables = (Net("user", (TableSpec("user", 9, 2), TableSpec("city", 5, 3))), Net("item", (TableSpec("item", 7, 4),)))
    first = Shard("a", ("h:1", "h:2"), (TablePart("item", 2, 0), TablePart("user")))
    second = Shard("b", ("h:3",), (TablePart("item", 2, 1), TablePart("city")))
    layout = ShardLayout("p", tables, (first, second))
    layout.check()
    assert layout.served_by(first) == (
        ServedNet("user", (ServedPart(TablePart("user"), 9, 2),)),
        ServedNet("item", (ServedPart(TablePart("item", 2, 0), 4, 4),)),
    )
    assert layout.served_by(second) == (
        ServedNet("user", (ServedPart(TablePart("city"), 5, 3),)),
        ServedNet("item", (ServedPart(TablePart("item", 2, 1), 3, 4),)),
    )
    assert msgspec.json.decode(msgspec.json.encode(layout), type=ShardLayout) == layout


TABLES = (Net("n", (TableSpec("t", 10, 2), TableSpec("u", 10, 2))),)


@pytest.mark.parametrize(
    ("nets", "shards", "words"),
    [
        (TABLES, [("a", [("t", 1, 0)])], "table 'u' is split by nothing"),
        (TABLES, [("a", [("t", 2, 0), ("u", 1, 0)])], r"split by 2, the parts \[0\] are"),
        (TABLES, [("a", [("t", 1, 0), ("u", 1, 0)]), ("b", [("u", 1, 0)])], r"the parts \[0, 0\] are"),
        (TABLES, [("a", [("t", 2, 0), ("u", 1, 0)]), ("b", [("t", 3, 1)])], "split by 2 and by 3"),
        (TABLES, [("a", [("t", 1, 0), ("u", 2, 0), ("u", 2, 1)])], "two parts of 'u'"),
        (TABLES, [("a", [("t", 1, 0), ("u", 1, 0), ("uu", 1, 0)])], "Did you mean 'u'"),
        (TABLES, [("a", [("t", 1, 0)]), ("a", [("u", 1, 0)])], "shard 'a' twice"),
        ((*TABLES, TABLES[0]), [("a", [("t", 1, 0), ("u", 1, 0)])], "table 't' twice"),
        ((*TABLES, Net("n", ())), [("a", [("t", 1, 0), ("u", 1, 0)])], "net 'n' twice"),
    ],
)
def test_a_layout_that_does_not_hold_together_is_refused(
    nets: tuple[Net, ...], shards: list[tuple[str, list[tuple[str, int, int]]]], words: str
) -> None:
    made = tuple(Shard(name, ("h:1",), tuple(TablePart(*part) for part in parts)) for name, parts in shards)
    with pytest.raises(ConfigError, match=words):
        Router(ShardLayout("p", nets, made))


def test_a_shard_without_an_address_is_refused() -> None:
    with pytest.raises(ConfigError, match="no address"):
        Router(ShardLayout("p", TABLES, (Shard("a", (), (TablePart("t"), TablePart("u"))),)))
