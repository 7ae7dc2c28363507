"""What a shard is asked and what it answers: the payloads of POOL and POOLED. Little-endian.

POOL: the net, then the headers of all blocks and parts, then the numbers of all parts in the same order.

    net uint16, number of blocks uint16
    block    samples uint32, parts uint16, 0 uint16
    part     part uint16, bytes of a count uint8 (0: all samples have the same number of ids), bytes of an id uint8,
             number of ids uint32
    numbers  of each part: a count of each sample (uint8, 16 or 32), its ids (uint16, 32 or 64) by sample

A block is a set of samples. A request has one of all samples, and others for parts of which several samples have the
same ids: ids and sums travel once. `routing_kernels.py` writes requests.

Worked example: net 1, 2 samples, part 3, ids [7] and [2, 2]
    01 00 01 00 | 02 00 00 00 01 00 00 00 | 03 00 01 02 03 00 00 00 | 01 02  07 00 02 00 02 00

POOLED: of each block its sums (samples, width) float32, the widths of its parts side by side; or as asked in bfloat16,
the upper half of the float32 that is nearest.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rankd.embeddings.jagged import JaggedIds
from rankd.errors import InvalidRequest, PayloadTooLarge
from rankd.shards.shard_layout import ServedNet
from rankd.types import Array

_REQUEST, _BLOCK, _PART = struct.Struct("<HH"), struct.Struct("<IHH"), struct.Struct("<HBBI")
_UNSIGNED: dict[int, np.dtype[np.unsignedinteger]] = {
    1: np.dtype("u1"),
    2: np.dtype("<u2"),
    4: np.dtype("<u4"),
    8: np.dtype("<u8"),
}
VALUE_BYTES, NARROW_BYTES = 4, 2
"""Of a number of the sums, in float32 and in bfloat16."""
_COUNT_BYTES, _ID_BYTES = (1, 2, 4), (2, 4, 8)


@dataclass(frozen=True, slots=True)
class PoolRequest:
    """As a shard reads it: blocks of ids with the names of their tables, their rows counted in the part."""

    net: int
    blocks: tuple[JaggedIds, ...]


def id_type(rows: int) -> np.dtype[np.unsignedinteger]:
    """The smallest type that ids of a part of so many rows are sent in."""
    return _UNSIGNED[2 if rows <= 1 << 16 else 4 if rows <= 1 << 32 else 8]


def read_pool(
    payload: memoryview, nets: Sequence[ServedNet], max_answer_bytes: int, narrow: bool = False
) -> PoolRequest:
    """The payload of a POOL frame, whose sums are answered in bfloat16 if it is `narrow`. What is read takes memory in
    proportion to it and to its answer.

    Raises:
        InvalidRequest: it is none, or of other nets and parts.
        PayloadTooLarge: its answer would be over the limit.
    """
    try:
        net, num_blocks = _REQUEST.unpack_from(payload)
        if net >= len(nets):
            raise InvalidRequest(f"net {net} was asked, here are {len(nets)}")
        place, headers = _REQUEST.size, []
        for _ in range(num_blocks):
            num_samples, num_parts, _ = _BLOCK.unpack_from(payload, place)
            end = place + _BLOCK.size + num_parts * _PART.size
            headers.append((num_samples, list(_PART.iter_unpack(payload[place + _BLOCK.size : end]))))
            if not num_samples or not num_parts or len(headers[-1][1]) != num_parts:
                raise InvalidRequest(f"a block of {num_samples} samples and {num_parts} parts is cut off or empty")
            place = end
    except struct.error as error:
        raise InvalidRequest(f"a request of {payload.nbytes} bytes ends within its headers") from error
    reader = _Numbers(payload[place:])
    _check_answer(nets[net], headers, NARROW_BYTES if narrow else VALUE_BYTES, max_answer_bytes)
    blocks = tuple(reader.block(nets[net], num_samples, parts) for num_samples, parts in headers)
    reader.check_end()
    return PoolRequest(net, blocks)


class _Numbers:
    """The counts and ids behind the headers, read in their order."""

    def __init__(self, left: memoryview) -> None:
        self._left = left

    def block(self, net: ServedNet, num_samples: int, parts: list[tuple[int, int, int, int]]) -> JaggedIds:
        sizes = [num_ids for _, _, _, num_ids in parts]
        if sum(sizes) * min(_ID_BYTES) > self._left.nbytes:  # before memory is taken for them
            raise InvalidRequest(f"{sum(sizes)} ids are said to follow in {self._left.nbytes} bytes")
        offsets = np.zeros(len(parts) * num_samples + 1, np.int64)
        ids = np.empty(sum(sizes), np.int64)
        begin = 0
        for place, (_, count_bytes, id_bytes, num_ids) in enumerate(parts):
            counts = offsets[1 + place * num_samples : 1 + (place + 1) * num_samples]
            self._counts(counts, count_bytes, num_ids)
            ids[begin : begin + num_ids] = self._take(num_ids, id_bytes, _ID_BYTES)
            begin += num_ids
        np.cumsum(offsets, out=offsets)
        return JaggedIds(tuple(net.parts[part].part.table for part, _, _, _ in parts), offsets, ids)

    def check_end(self) -> None:
        if self._left.nbytes:
            raise InvalidRequest(f"{self._left.nbytes} bytes follow the last part")

    def _counts(self, counts: Array, count_bytes: int, num_ids: int) -> None:
        if count_bytes:
            counts[:] = self._take(len(counts), count_bytes, _COUNT_BYTES)
        elif num_ids % len(counts):
            raise InvalidRequest(f"{num_ids} ids are not the same number for each of {len(counts)} samples")
        else:
            counts[:] = num_ids // len(counts)
        if counts.sum() != num_ids:
            raise InvalidRequest(f"counts of {counts.sum()} ids came with {num_ids} of them")

    def _take(self, count: int, size: int, allowed: tuple[int, ...]) -> Array:
        if size not in allowed or count * size > self._left.nbytes:
            raise InvalidRequest(
                f"{count} numbers of {size} bytes are said to follow in {self._left.nbytes} bytes; sizes are {allowed}"
            )
        numbers: Array = np.frombuffer(self._left, _UNSIGNED[size], count)
        self._left = self._left[count * size :]
        return numbers


def _check_answer(
    net: ServedNet, headers: list[tuple[int, list[tuple[int, int, int, int]]]], value_bytes: int, most: int
) -> None:
    answer_bytes = 0
    for num_samples, parts in headers:
        for part, _, _, _ in parts:
            if part >= len(net.parts):
                raise InvalidRequest(f"part {part} of net '{net.name}' was asked, here are {len(net.parts)}")
            answer_bytes += value_bytes * num_samples * net.parts[part].dim
    if answer_bytes > most:
        raise PayloadTooLarge(f"the answer would have {answer_bytes} bytes, sent are {most}: ask for fewer samples")
