"""Layouts: what each shard serves, where each row is, and which layouts are refused."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.embeddings.table_spec import TablePart, TableSpec
from rankd.errors import ConfigError
from rankd.shards.pool_frames import pool_payload
from rankd.shards.routing import Router
from rankd.shards.shard_layout import Net, ServedNet, ServedPart, Shard, ShardLayout
from tests.shards.plain_tables import jagged, two_shards


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


def test_the_worked_example_of_routing() -> None:
    layout = two_shards()
    router = Router(layout)
    asked = jagged(["item"], [[[6, 3], [4]]])
    first, second = router.route(asked, router.places(asked))
    found = [(call.shard, *pool_payload(0, call.asked())[1:]) for call in (first, second)]
    assert found == [(0, b"\1\1", b"\3\0\2\0"), (1, b"\1\0", b"\1\0")]


@given(st.lists(st.lists(st.integers(0, 100), max_size=5), min_size=1, max_size=6), st.integers(1, 5))
def test_each_id_goes_to_the_part_that_has_it_and_to_its_sample(ids: list[list[int]], modulus: int) -> None:
    shards = tuple(Shard(f"s{number}", ("h:1",), (TablePart("t", modulus, number),)) for number in range(modulus))
    router = Router(ShardLayout("p", (Net("n", (TableSpec("t", 101, 1),)),), shards))
    asked = jagged(["t"], [ids])
    found: list[list[int]] = [[] for _ in ids]
    for call in router.route(asked, router.places(asked)):
        for samples, pieces in call.blocks():
            for piece in pieces:
                counts = piece.ids.counts
                if counts is None:
                    counts = np.full(samples, len(piece.ids.ids) // samples)
                ends = np.cumsum(counts)
                assert len(ends) == samples
                for sample in range(len(ids)):
                    place = 0 if samples == 1 else sample
                    rows = piece.ids.ids[ends[place] - counts[place] : ends[place]].astype(int)
                    found[sample] += (rows * modulus + piece.remainder).tolist()
    assert [sorted(one) for one in found] == [sorted(one) for one in ids]


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


def test_ids_travel_as_one_sample_only_if_all_samples_have_them() -> None:
    layout = two_shards()
    router = Router(layout)
    for ids, alike in (
        ([[1, 2], [1, 2], [1, 2]], True),
        ([[1, 2], [1, 3], [1, 2]], False),
        ([[1, 2], [1], [1, 2]], False),
        ([[1, 2]], True),
    ):
        asked = jagged(["user"], [ids])
        (call,) = router.route(asked, router.places(asked))
        assert (len(call.same), len(call.each)) == ((1, 0) if alike else (0, 1)), ids
