"""The GPU reads states from the host's memory and writes new tokens into it, by addresses that travel as numbers.

Page-locked memory has the same addresses on both sides. A few programs go through all the work there is, in turn: that
is enough to keep the bus busy, and leaves the processors to what is computed meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankd.engine.cuda.kernels.triton_pieces import INTERPRETED, room_of
from rankd.engine.cuda.kernels.triton_state_rows import put_rows
from rankd.engine.cuda.paged_states import PagedStates

ROW = 5
"""Numbers of a page's row: see `fetched_states.py`."""
PROGRAMS = 2 if INTERPRETED.value else 64
"""64 pieces of 8 KiB under way are five times what a bus of 64 GB/s brings in 1.5 us; half of an H200's processors have
one. Nobody has measured it."""
CHUNK = 2048
"""Numbers that are written to the host in one piece."""
KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@triton.jit
def _fetch(
    pool, scales, page_times, rows, count, parts,
    HEADS: tl.constexpr, HEAD: tl.constexpr, ROOM: tl.constexpr, PAGE: tl.constexpr, FP8: tl.constexpr,
    KIND: tl.constexpr, SIZE: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Pieces of work: one page, keys or values of one layer, one head; of the times the first piece of a page."""
    lane, columns = tl.arange(0, PAGE), tl.arange(0, ROOM)
    for work in range(tl.program_id(0), tl.load(count) * parts * HEADS, tl.num_programs(0)):
        part, head = work // HEADS % parts, work % HEADS
        row = rows + work // HEADS // parts * FIELDS
        real, page = lane < tl.load(row + 3), tl.load(row + 4)
        if part == 0 and head == 0:
            moments = tl.load(row + 1).to(tl.pointer_type(tl.int32))
            tl.store(page_times + page * PAGE + lane, tl.load(moments + lane, mask=real, other=0), real)
        source = (tl.load(row) + part * tl.load(row + 2) + head * (HEAD * SIZE)).to(tl.pointer_type(KIND))
        if HEAD * SIZE % 16 == 0:
            source = tl.multiple_of(source, 16)  # as pages and layers are, where heads are
        inside = real[:, None] & (columns < HEAD)[None, :]
        numbers = tl.load(source + lane[:, None] * (HEADS * HEAD) + columns[None, :], mask=inside, other=0.0)
        stored, column = (page * parts + part) * PAGE + lane, (head * HEAD + columns)[None, :]
        put_rows(pool, scales, stored, column, numbers.to(tl.float32), real, inside, head, HEADS, HEAD, FP8)


@triton.jit
def _deliver(
    fresh, tiles, homes, apart, blocks, num_tiles, parts, capacity,
    WIDTH: tl.constexpr, KIND: tl.constexpr, SIZE: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Pieces of work: one tile of rows of one user, keys or values of one layer, which are in one piece everywhere."""
    lane = tl.arange(0, PIECE)
    for work in range(tl.program_id(0), blocks * num_tiles * parts, tl.num_programs(0)):
        part, block = work % parts, work // parts // num_tiles
        tile = tiles + work // parts * 4
        user, first, before, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
        if user >= 0:
            home = tl.load(homes + user * blocks + block)
            if home != 0:
                distance = part * tl.load(apart + user).to(tl.int64) + before * (WIDTH * SIZE)
                target = (home + distance).to(tl.pointer_type(KIND))
                source = fresh + ((block * parts + part).to(tl.int64) * capacity + first) * WIDTH
                if WIDTH * SIZE % 16 == 0:
                    target = tl.multiple_of(target, 16)
                    source = tl.multiple_of(source, 16)
                for start in range(0, count * WIDTH, PIECE):
                    real = start + lane < count * WIDTH
                    tl.store(target + start + lane, tl.load(source + start + lane, mask=real), real)


@dataclass(frozen=True, slots=True)
class Homes:
    """Where new tokens of U users go: `addresses` (U, N) int64 of a block's first token on the host, 0: nowhere.
    Layers, keys and values lie `apart` (U,) int32 bytes. `tiles` (N, X, 4) int32 say whose a row is."""

    addresses: Tensor
    apart: Tensor
    tiles: Tensor


def fetch_pages(states: PagedStates, rows: Tensor, count: Tensor, heads: int, dtype: torch.dtype) -> None:
    """Copy the first `count` (1,) int32 pages of rows (M, ROW) int64 from the host, where numbers are of `dtype`."""
    _, layers, both, page, width = states.keys_values.shape
    head = width // heads
    _fetch[(PROGRAMS,)](
        states.keys_values, states.scales, states.times, rows, count, layers * both,
        HEADS=heads, HEAD=head, ROOM=room_of(head), PAGE=page, FP8=states.fp8, KIND=KINDS[dtype], SIZE=dtype.itemsize,
        FIELDS=ROW, num_warps=4,
    )  # fmt: skip


def deliver_rows(fresh: Tensor, homes: Homes) -> None:
    """Write new tokens of fresh (N, L, 2, R, A) to the host, behind one another from their homes on."""
    blocks, layers, both, capacity, width = fresh.shape
    _deliver[(PROGRAMS,)](
        fresh, homes.tiles, homes.addresses, homes.apart, blocks, homes.tiles.shape[1], layers * both, capacity,
        WIDTH=width, KIND=KINDS[fresh.dtype], SIZE=fresh.dtype.itemsize, PIECE=CHUNK, num_warps=4,
    )  # fmt: skip
