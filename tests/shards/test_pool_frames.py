"""Requests as bytes: written by hand, back and forth, and any bytes at all."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.table_spec import TablePart
from rankd.errors import InvalidRequest, PayloadTooLarge
from rankd.shards.pool_frames import PoolRequest, id_type, read_pool
from rankd.shards.shard_layout import ServedNet, ServedPart
from tests.shards.plain_payload import Block, PartIds, pool_payload

MOST = 1 << 20
NETS = (
    ServedNet("one", (ServedPart(TablePart("a"), 10, 2),)),
    ServedNet("two", tuple(ServedPart(TablePart(name), 1000, dim) for name, dim in (("b", 1), ("c", 3), ("d", 2)))),
)
HEADERS = b"\1\0\1\0\2\0\0\0\1\0\0\0\2\0\1\2\3\0\0\0"
BY_HAND = HEADERS + b"\1\2\7\0\2\0\2\0"


def read(payload: bytes, most: int = MOST) -> PoolRequest:
    """As a shard of NETS reads it."""
    return read_pool(memoryview(payload), NETS, most)


def part_ids(part: int, ids: list[list[int]], size: int) -> PartIds:
    """Of some samples."""
    counts = np.array([len(one) for one in ids], np.int64)
    return PartIds(
        part,
        None if counts.min() == counts.max() else counts,
        np.array([row for one in ids for row in one], f"<u{size}"),
    )


def test_a_request_written_by_hand() -> None:
    request = read(BY_HAND)
    assert request.net == 1
    (asked,) = request.blocks
    assert asked.tables == ("d",)
    assert (asked.offsets.tolist(), asked.ids.tolist()) == ([0, 1, 3], [7, 2, 2])
    assert asked.ids.dtype == asked.offsets.dtype == np.int64
    assert b"".join(pool_payload(1, [Block(2, [part_ids(2, [[7], [2, 2]], 2)])])) == BY_HAND


@st.composite
def block_of(draw: st.DrawFn) -> Block:
    """Of net "two"."""
    samples = draw(st.integers(1, 4))
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        each = draw(st.sampled_from([1, 3, 300, 70_000])) if draw(st.booleans()) else None
        lists = (
            [[5] * (each if number == 0 else 1) for number in range(samples)]
            if each
            else [draw(st.lists(st.integers(0, 999), max_size=4)) for _ in range(samples)]
        )
        parts.append(part_ids(draw(st.integers(0, 2)), lists, draw(st.sampled_from([2, 4, 8]))))
    return Block(samples, parts)


@given(st.lists(block_of(), max_size=3))
def test_what_is_written_is_read(blocks: list[Block]) -> None:
    request = read(b"".join(pool_payload(1, blocks)))
    assert len(request.blocks) == len(blocks)
    for asked, block in zip(request.blocks, blocks, strict=True):
        asked.check()
        assert asked.num_samples == block.num_samples
        assert asked.tables == tuple("bcd"[part.part] for part in block.parts)
        np.testing.assert_array_equal(asked.ids, np.concatenate([part.ids for part in block.parts]))
        counts = [
            np.full(block.num_samples, len(part.ids) // block.num_samples) if part.counts is None else part.counts
            for part in block.parts
        ]
        np.testing.assert_array_equal(np.diff(asked.offsets), np.concatenate(counts))


def check_any(payload: bytes) -> None:
    """A payload is either refused or fits together."""
    with contextlib.suppress(InvalidRequest):
        for asked in read(payload).blocks:
            assert isinstance(asked, JaggedIds)
            asked.check()


@given(st.binary(max_size=60))
@example(b"\1\0\1\0" + b"\xff\xff\xff\xff\1\0\0\0" + b"\0\0\0\2\0\0\0\0")
@example(b"\1\0\1\0" + b"\1\0\0\0\1\0\0\0" + b"\0\0\0\2\xff\xff\xff\xff")
def test_any_bytes_are_refused_or_fit_together(payload: bytes) -> None:
    check_any(payload)


@given(st.lists(block_of(), min_size=1, max_size=2), st.data())
def test_altered_requests_are_refused_or_fit_together(blocks: list[Block], data: st.DataObject) -> None:
    payload = bytearray(b"".join(pool_payload(1, blocks)))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, min(len(payload), 60) - 1))] = data.draw(st.integers(0, 255))
    check_any(bytes(payload))


@pytest.mark.parametrize("end", range(len(BY_HAND)))
def test_a_request_that_stops_is_refused(end: int) -> None:
    with pytest.raises(InvalidRequest):
        read(BY_HAND[:end])


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (BY_HAND + b"\0", "1 bytes follow"),
        (b"\2" + BY_HAND[1:], "net 2 was asked, here are 2"),
        (BY_HAND.replace(b"\2\0\1\2\3", b"\3\0\1\2\3"), "part 3 of net 'two'"),
        (HEADERS + b"\1\1" + BY_HAND[-6:], "counts of 2 ids came with 3"),
        (HEADERS.replace(b"\2\0\1\2\3", b"\2\0\0\2\3") + BY_HAND[-6:], "not the same number"),
        (BY_HAND.replace(b"\2\0\1\2\3", b"\2\0\1\1\3"), "numbers of 1 bytes"),
        (b"\1\0\1\0" + bytes(8), "0 samples and 0 parts"),
    ],
)
def test_what_is_wrong_is_said(payload: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        read(payload)


def test_an_answer_over_the_limit_is_refused_before_memory_is_taken() -> None:
    read(BY_HAND, most=2 * 2 * 4)
    with pytest.raises(PayloadTooLarge, match="16 bytes, sent are 15"):
        read(BY_HAND, most=15)
    huge = b"\1\0\1\0" + b"\xff\xff\xff\xff\1\0\0\0" + b"\1\0\0\2\0\0\0\0"
    with pytest.raises(PayloadTooLarge, match=str((2**32 - 1) * 12)):
        read(huge)


def test_ids_travel_in_the_fewest_bytes() -> None:
    sizes = [id_type(rows).itemsize for rows in (1, 1 << 16, (1 << 16) + 1, 1 << 32, (1 << 32) + 1)]
    assert sizes == [2, 2, 4, 4, 8]
    once = part_ids(0, [[1], [2], [3]], 2)
    assert sum(view.nbytes for view in pool_payload(1, [Block(3, [once])])) == 4 + 8 + 8 + 3 * 2
