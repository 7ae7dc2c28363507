"""What shards are asked, decoded as they decode it, against the plain meaning of a layout; and answers added up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.table_spec import TablePart, TableSpec
from rankd.errors import InvalidRequest
from rankd.shards.pool_frames import PoolRequest, read_pool
from rankd.shards.routing import Routed, RoutedCall, Router
from rankd.shards.shard_layout import Net, Shard, ShardLayout
from rankd.types import Array
from tests.shards.plain_payload import Block, PartIds, pool_payload
from tests.shards.plain_tables import jagged, layouts, one_shard, part_of, questions, two_shards, whole

MOST = 1 << 30


def decoded(layout: ShardLayout, call: RoutedCall) -> PoolRequest:
    """As the shard reads it."""
    return read_pool(call.payload, layout.served_by(layout.shards[call.shard]), MOST)


def answered(layout: ShardLayout, call: RoutedCall) -> Array:
    """What the shard sends."""
    own = part_of(layout, layout.shards[call.shard])
    sums = [own.pool(block).reshape(-1) for block in decoded(layout, call).blocks]
    answer: Array = np.concatenate(sums).view(np.uint8)
    assert answer.nbytes == call.answer_bytes
    return answer


def added_up(layout: ShardLayout, routed: Routed) -> list[Array]:
    into, columns = routed.room()
    for array in into:
        array.fill(np.nan)
    routed.add_up([answered(layout, call) for call in routed.calls], into, columns)
    return list(into)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_routed_pooled_and_added_up_is_what_one_place_gives(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    router, plain = Router(layout), whole(layout)
    for _ in range(3):
        asked = data.draw(st.lists(questions(layout, most_samples=200), max_size=3))
        routed = router.route(asked)
        assert len({(call.shard, call.net) for call in routed.calls}) == len(routed.calls)
        for one, values in zip(asked, added_up(layout, routed), strict=True):
            np.testing.assert_allclose(values, plain.pool(one), rtol=1e-5, atol=1e-5)


@given(st.lists(st.lists(st.integers(0, 100), max_size=5), min_size=1, max_size=60, unique_by=tuple), st.integers(1, 5))
def test_each_id_goes_to_the_part_that_has_it_and_to_its_sample(ids: list[list[int]], modulus: int) -> None:
    """Fewer samples than are worth counting as alike: each bag stands in its place, unless all are the same."""
    shards = tuple(Shard(f"s{number}", ("h:1",), (TablePart("t", modulus, number),)) for number in range(modulus))
    layout = ShardLayout("p", (Net("n", (TableSpec("t", 101, 1),)),), shards)
    found: list[list[int]] = [[] for _ in ids]
    for call in Router(layout).route([jagged(["t"], [ids])]).calls:
        (block,) = decoded(layout, call).blocks
        for sample in range(len(ids)):
            place = 0 if block.num_samples == 1 else sample
            rows = block.ids[block.offsets[place] : block.offsets[place + 1]]
            found[sample] += (rows * modulus + call.shard).tolist()
    assert [sorted(one) for one in found] == [sorted(one) for one in ids]


@pytest.mark.parametrize("rows", [1 << 16, (1 << 16) + 1, (1 << 32) + 1])
@pytest.mark.parametrize("ids", [[[1], [2], [3, 4]], [[5, 6], [7, 8]], [[0] * 300, [1]], [[0] * 70_000, []]])
def test_payloads_are_those_of_the_plain_writer(rows: int, ids: list[list[int]]) -> None:
    layout = ShardLayout("p", (Net("n", (TableSpec("t", rows, 1),)),), (Shard("s", ("h:1",), (TablePart("t"),)),))
    (call,) = Router(layout).route([jagged(["t"], [ids])]).calls
    counts = np.array([len(one) for one in ids], np.int64)
    kind = "<u2" if rows == 1 << 16 else "<u4" if rows < 1 << 32 else "<u8"
    flat = np.array([one for some in ids for one in some], kind)
    part = PartIds(0, None if counts.min() == counts.max() else counts, flat)
    assert bytes(call.payload) == b"".join(pool_payload(0, [Block(len(ids), [part])]))


def test_the_worked_example() -> None:
    layout = two_shards()
    first, second = Router(layout).route([jagged(["item"], [[[6, 3], [4]]])]).calls
    assert (first.shard, bytes(first.payload[-6:])) == (0, b"\2\0\0\0\3\0\2\0"[-6:])
    assert (second.shard, bytes(second.payload[-4:])) == (1, b"\1\0\1\0")


def test_questions_of_other_numbers_of_samples_travel_in_one_call() -> None:
    layout = two_shards()
    candidates = jagged(["user"], [[[number] for number in range(40)]])
    calls = Router(layout).route([jagged(["user"], [[[7, 8]]]), candidates]).calls
    assert [[block.num_samples for block in decoded(layout, call).blocks] for call in calls] == [[1, 40]]


@pytest.mark.parametrize(
    ("ids", "blocks"),
    [
        ([[1, 2], [1, 2], [1, 2]], [1]),
        ([[1, 2], [1, 3], [1, 2]], [3]),
        ([[1, 2], [1], [1, 2]], [3]),
        ([[1, 2]], [1]),
        ([[number % 10, 3] for number in range(700)], [88]),
        ([[number % 100] for number in range(700)], [700]),  # the first 64 are all different
        ([[number % 50] for number in range(70)], [64]),
        ([[]] * 600 + [[number % 25, number % 2] for number in range(100)], [88]),
    ],
)
def test_what_samples_have_in_common_travels_once(ids: list[list[int]], blocks: list[int]) -> None:
    layout = one_shard()
    routed = Router(layout).route([jagged(["item"], [ids])])
    (call,) = routed.calls
    assert [block.num_samples for block in decoded(layout, call).blocks] == blocks
    expected = whole(layout).pool(jagged(["item"], [ids]))
    np.testing.assert_allclose(added_up(layout, routed)[0], expected, rtol=1e-5, atol=1e-6)


def test_samples_without_a_row_of_a_part_do_not_have_sums_of_their_own() -> None:
    """Of a table split in four, each part answers for the samples that have any of its rows, and once for the rest."""
    shards = tuple(Shard(f"s{number}", ("h:1",), (TablePart("t", 4, number),)) for number in range(4))
    layout = ShardLayout("p", (Net("n", (TableSpec("t", 4000, 2),)),), shards)
    calls = Router(layout).route([jagged(["t"], [[[number] for number in range(512)]])]).calls
    assert [[block.num_samples for block in decoded(layout, call).blocks] for call in calls] == [[192]] * 4


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (jagged(["user", "itme"], [[[1]], [[1]]]), "Did you mean 'item'"),
        (jagged(["user", "item"], [[[1]], [[101]]]), "table 'item' has rows 0 to 100; row 101 was asked"),
        (jagged(["user"], [[[1], [2, -1]]]), "row -1 was asked"),
        (JaggedIds(("item",), np.array([0, 2]), np.array([1])), "these do not"),
    ],
)
def test_what_cannot_be_is_refused(asked: JaggedIds, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        Router(two_shards()).route([jagged(["city"], [[[3]]]), asked])
