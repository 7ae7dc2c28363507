"""Keys and values go into pages: those of new events, with their times, which beside that leave the GPU as rows; and
those of states that come from the host.

In e4m3 each head of each token has a scale of its own, for keys and for values: its largest number becomes 448.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from rankd.engine.cuda.kernels.triton_history_attention import HistoryRows
from rankd.engine.cuda.kernels.triton_pieces import narrowed, room_of
from rankd.engine.cuda.paged_states import PagedStates


@triton.jit
def _store(
    pool, scales, page_times, table, fresh, qkv, tiles, known, row_times, time_group,
    layer, layers, num_tiles, most_pages, qkv_group, qkv_row, capacity,
    HEADS: tl.constexpr, HEAD: tl.constexpr, ROOM: tl.constexpr, PAGE: tl.constexpr, FP8: tl.constexpr,
    block_rows: tl.constexpr,
):  # fmt: skip
    """One tile of rows, one head, one block of the model."""
    head, block, blocks = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    tile = tiles + (block * num_tiles + tl.program_id(0)) * 4
    user, first, before, rows = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    if user < 0:
        return
    seat = user * blocks + block
    lane, columns = tl.arange(0, block_rows), tl.arange(0, ROOM)
    real = lane < rows
    row, inside = first + lane, real[:, None] & (columns < HEAD)[None, :]
    place = tl.load(known + seat) + before + lane
    page = tl.load(table + seat * most_pages + place // PAGE, mask=real, other=0).to(tl.int64)
    if head == 0:
        moments = tl.load(row_times + block * time_group + row, mask=real, other=0)
        tl.store(page_times + page * PAGE + place % PAGE, moments, real)
    for which in tl.static_range(2):  # keys, values
        of_head = ((which + 1) * HEADS + head) * HEAD + columns
        made = qkv + block.to(tl.int64) * qkv_group + row[:, None] * qkv_row + of_head[None, :]
        numbers = tl.load(made, mask=inside, other=0.0).to(tl.float32)
        leaving = ((block.to(tl.int64) * layers + layer) * 2 + which) * capacity + row
        column = (head * HEAD + columns)[None, :]
        tl.store(fresh + leaving[:, None] * (HEADS * HEAD) + column, narrowed(numbers, fresh.dtype.element_ty), inside)
        stored = ((page * layers + layer) * 2 + which) * PAGE + place % PAGE
        put_rows(pool, scales, stored, column, numbers, real, inside, head, HEADS, HEAD, FP8)


@triton.jit
def put_rows(
    pool, scales, stored, column, numbers, real, inside, head, HEADS: tl.constexpr, HEAD: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    """Write numbers (rows, room) of one head into rows of pages."""
    if FP8:
        largest = tl.max(tl.abs(numbers), 1)
        scale = tl.where(largest > 0, largest / 448.0, 1.0)
        tl.store(scales + stored * HEADS + head, scale, real)
        numbers = numbers / scale[:, None]
    tl.store(pool + stored[:, None] * (HEADS * HEAD) + column, narrowed(numbers, pool.dtype.element_ty), inside)


@triton.jit
def _place(
    pool, scales, page_times, arrived, arrived_times, places, count,
    HEADS: tl.constexpr, HEAD: tl.constexpr, ROOM: tl.constexpr, PAGE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """One page that has arrived, one head, keys or values of one layer."""
    number, part, head, parts = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    if number >= tl.load(count):
        return
    page = tl.load(places + number).to(tl.int64)
    lane, columns = tl.arange(0, PAGE), tl.arange(0, ROOM)
    if part == 0 and head == 0:
        tl.store(page_times + page * PAGE + lane, tl.load(arrived_times + number * PAGE + lane))
    real, column = lane < PAGE, (head * HEAD + columns)[None, :]
    inside = real[:, None] & (columns < HEAD)[None, :]
    came = (number.to(tl.int64) * parts + part) * PAGE + lane
    numbers = tl.load(arrived + came[:, None] * (HEADS * HEAD) + column, mask=inside, other=0.0).to(tl.float32)
    stored = (page * parts + part) * PAGE + lane
    put_rows(pool, scales, stored, column, numbers, real, inside, head, HEADS, HEAD, FP8)


@dataclass(frozen=True, slots=True)
class ArrivedPages:
    """The first `count` (1,) int32 of M pages: numbers (M, L, 2, S, A), times (M, S) int32, and where they belong,
    places (M,) int32."""

    count: Tensor
    places: Tensor
    times: Tensor
    numbers: Tensor


def place_pages(states: PagedStates, arrived: ArrivedPages, heads: int) -> None:
    """Copy pages that came from the host to their places, in the type of those."""
    pages, layers, both, page, width = arrived.numbers.shape
    head = width // heads
    _place[(pages, layers * both, heads)](
        states.keys_values, states.scales, states.times, arrived.numbers, arrived.times, arrived.places, arrived.count,
        HEADS=heads, HEAD=head, ROOM=room_of(head), PAGE=page, FP8=states.fp8,
        num_warps=8,
    )  # fmt: skip


def store_rows(states: PagedStates, fresh: Tensor, qkv: Tensor, rows: HistoryRows, layer) -> None:
    """Write keys and values of qkv (N, R, 3 A or more) into their pages, and into fresh (N, L, 2, R, A) row by row;
    their times go into the pages."""
    blocks, width = qkv.shape[0], fresh.shape[-1]
    heads = states.scales.shape[-1]
    head, num_tiles = width // heads, rows.tiles.shape[1]
    _store[(num_tiles, heads, blocks)](
        states.keys_values, states.scales, states.times, states.table, fresh, qkv, rows.tiles, rows.known,
        rows.times, rows.times.stride(0),
        layer, states.layers, num_tiles, states.table.shape[2], qkv.stride(0), qkv.stride(1), fresh.shape[3],
        HEADS=heads, HEAD=head, ROOM=room_of(head), PAGE=states.page, FP8=states.fp8, block_rows=rows.block,
        num_warps=8,  # 4 spill registers at 64 rows
    )  # fmt: skip
