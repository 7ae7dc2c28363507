"""Requests written plainly: what the compiled writer is compared with, and what tests send that it never would."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from rankd.types import Array, Int64Array

_REQUEST, _BLOCK, _PART = struct.Struct("<HH"), struct.Struct("<IHH"), struct.Struct("<HBBI")


@dataclass(frozen=True, slots=True)
class PartIds:
    """Rows of a part for B samples. `part`: its place in its net; counts (B,) int64: of each sample, None if all have
    the same number; ids (n,): rows in the part, by sample, unsigned of 2, 4 or 8 bytes."""

    part: int
    counts: Int64Array | None
    ids: Array


@dataclass(frozen=True, slots=True)
class Block:
    """What the same samples are asked of several parts."""

    num_samples: int
    parts: Sequence[PartIds]


def pool_payload(net: int, blocks: Sequence[Block]) -> list[memoryview]:
    """The payload of a POOL frame; ids are not copied."""
    headers, numbers = [_REQUEST.pack(net, len(blocks))], []
    for block in blocks:
        headers.append(_BLOCK.pack(block.num_samples, len(block.parts), 0))
        for part in block.parts:
            count_bytes = 0
            if part.counts is not None:
                most = int(part.counts.max())
                count_bytes = 1 if most < 1 << 8 else 2 if most < 1 << 16 else 4
                numbers.append(part.counts.astype(f"<u{count_bytes}").data.cast("B"))
            headers.append(_PART.pack(part.part, count_bytes, part.ids.itemsize, len(part.ids)))
            if len(part.ids):
                numbers.append(part.ids.data.cast("B"))
    return [memoryview(b"".join(headers)), *numbers]
