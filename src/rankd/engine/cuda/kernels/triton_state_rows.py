"""Keys and values of new events go into the pages of their user's state, and beside them as rows that leave the GPU.

In e4m3 each head of each token has a scale of its own, for keys and for values: its largest number becomes 448.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rankd.engine.cuda.kernels.triton_history_attention import HistoryRows
from rankd.engine.cuda.kernels.triton_pieces import narrowed, room_of
from rankd.engine.cuda.paged_states import PagedStates


@triton.jit
def _store(
    pool, scales, table, fresh, qkv, tiles, known,
    layer, layers, num_tiles, most_pages, qkv_group, capacity,
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
    for which in tl.static_range(2):  # keys, values
        of_head = ((which + 1) * HEADS + head) * HEAD + columns
        made = qkv + block.to(tl.int64) * qkv_group + row[:, None] * (3 * HEADS * HEAD) + of_head[None, :]
        numbers = tl.load(made, mask=inside, other=0.0).to(tl.float32)
        leaving = ((block.to(tl.int64) * layers + layer) * 2 + which) * capacity + row
        column = (head * HEAD + columns)[None, :]
        tl.store(fresh + leaving[:, None] * (HEADS * HEAD) + column, narrowed(numbers, fresh.dtype.element_ty), inside)
        stored = ((page * layers + layer) * 2 + which) * PAGE + place % PAGE
        if FP8:
            largest = tl.max(tl.abs(numbers), 1)
            scale = tl.where(largest > 0, largest / 448.0, 1.0)
            tl.store(scales + stored * HEADS + head, scale, real)
            numbers = numbers / scale[:, None]
        tl.store(pool + stored[:, None] * (HEADS * HEAD) + column, narrowed(numbers, pool.dtype.element_ty), inside)


def store_rows(states: PagedStates, fresh: Tensor, qkv: Tensor, rows: HistoryRows, layer) -> None:
    """Write keys and values of qkv (N, R, 3 A) into their pages, and into fresh (N, L, 2, R, A) row by row."""
    blocks, width = qkv.shape[0], fresh.shape[-1]
    heads = states.scales.shape[-1]
    head, num_tiles = width // heads, rows.tiles.shape[1]
    _store[(num_tiles, heads, blocks)](
        states.keys_values, states.scales, states.table, fresh, qkv, rows.tiles, rows.known,
        layer, states.layers, num_tiles, states.table.shape[2], qkv.stride(0), fresh.shape[3],
        HEADS=heads, HEAD=head, ROOM=room_of(head), PAGE=states.page, FP8=states.fp8, block_rows=rows.block,
        num_warps=8,  # 4 spill registers at 64 rows
    )  # fmt: skip
