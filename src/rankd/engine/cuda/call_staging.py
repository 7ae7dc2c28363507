"""What a call sends to the GPU, in one pinned block and one transfer; and the tiles that say which row is whose.

A section is an array in the block, at the same place on both sides. Sections come in the order in which they are
declared; the last one may be filled in part, and then only the filled part travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from rankd.engine.cuda.cuda_device import Device, Way
from rankd.engine.cuda.kernels.triton_attention_steps import TILE_COLUMNS
from rankd.types import Array

ALIGNMENT = 256  # bytes; what kernels load in one piece never straddles two sections
HOST_TYPES = {torch.int32: np.int32, torch.int64: np.int64, torch.float32: np.float32, torch.bfloat16: np.uint16}
NOBODY = -1


@dataclass(frozen=True, slots=True)
class Section:
    """One array of a call."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.int32

    @property
    def num_bytes(self) -> int:
        """Bytes of it, rounded up to ALIGNMENT."""
        size = prod(self.shape) * self.dtype.itemsize
        return -(-size // ALIGNMENT) * ALIGNMENT


class CallStaging:
    """A pinned block and its twin on the GPU. `host` are the arrays to fill, `there` the tensors that kernels read."""

    def __init__(self, device: Device, sections: Sequence[Section]) -> None:
        self._device, total = device, sum(section.num_bytes for section in sections)
        self._pinned, self._block = device.pinned(total), device.empty((total,), torch.uint8)
        self._whole_rows = max(sections[-1].shape[0], 1)
        self._row_bytes = prod(sections[-1].shape[1:]) * sections[-1].dtype.itemsize
        self._before = total - sections[-1].num_bytes
        bytes_of_host: Array = self._pinned.numpy()
        self.host: dict[str, Array] = {}
        self.there: dict[str, Tensor] = {}
        start = 0
        for section in sections:
            size = prod(section.shape) * section.dtype.itemsize
            part = bytes_of_host[start : start + size]
            self.host[section.name] = part.view(HOST_TYPES[section.dtype]).reshape(section.shape)
            self.there[section.name] = self._block[start : start + size].view(section.dtype).view(section.shape)
            start += section.num_bytes

    def send(self, last_rows: int | None = None) -> None:
        """Begin the transfer of everything; of the last section the first `last_rows` rows, if that is said."""
        rows = self._whole_rows if last_rows is None else min(last_rows, self._whole_rows)
        size = self._before + rows * self._row_bytes
        self._device.transfer(Way.IN, self._block[:size], self._pinned[:size])


def fill_tiles(tiles: Array, counts: Sequence[int], block: int) -> None:
    """Tiles (X, 4) of `counts[u]` rows of each user, one user after the other; the rest is nobody's.

    >>> counts [20, 3], blocks of 16 -> [0, 0, 0, 16], [0, 16, 16, 4], [1, 20, 0, 3], [-1, ...], ...
    """
    made, first = [], 0
    for user, count in enumerate(counts):
        made += [(user, first + start, start, min(block, count - start)) for start in range(0, count, block)]
        first += count
    tiles[:, 0] = NOBODY
    if made:
        tiles[: len(made)] = made


def most_tiles(rows: int, users: int, block: int) -> int:
    """How many tiles there can be: each user's last one may be short."""
    return rows // block + users


def tile_shape(rows: int, users: int, block: int) -> tuple[int, int]:
    """Of the tiles of one block."""
    return most_tiles(rows, users, block), TILE_COLUMNS


def rung(size: int) -> int:
    """The bucket of a size: 16, 24, 32, 48, 64, 96, ...; at most half of a launch is for nobody.

    >>> rung(1), rung(17), rung(33), rung(100)
    (16, 24, 48, 128)
    """
    rounded = 16
    while rounded < size:
        half = rounded + rounded // 2
        if size <= half:
            return half
        rounded *= 2
    return rounded


def rung_of_users(users: int) -> int:
    """The bucket of a number of users: a power of two."""
    return 1 << (users - 1).bit_length()
