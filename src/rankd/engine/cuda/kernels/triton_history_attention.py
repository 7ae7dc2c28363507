"""New events attend to what their user did before them and to themselves, a ragged batch of users in one launch.

Keys and values of all events, the new ones too, lie in pages. Event i of a block sees the events 0..i. Position and
time are counted in the kernel, and no mask is ever in memory: a tile ends at the last key that one of its rows sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from rankd.engine.cuda.kernels.triton_attention_steps import (
    CONFIGS,
    AttentionTables,
    Weighting,
    in_a_page,
    relative_bias,
    rows_at,
    weighed,
)
from rankd.engine.cuda.kernels.triton_pieces import MASKED, narrowed, product, room_of, tuned
from rankd.engine.cuda.paged_states import PagedStates


@dataclass(frozen=True, slots=True)
class HistoryRows:
    """Which rows are whose. Worked example, tiles of 16 rows, two users with 20 and 3 new events in block 0:

        tiles[0] = [[0, 0, 0, 16], [0, 16, 16, 4], [1, 20, 0, 3], [-1, 0, 0, 0]]

    tiles (N, X, 4) int32, see `TILE_COLUMNS`; known (U, N) int32 events of which pages hold the state already; times
    (N, R) int32 of the rows. `block` is how many rows a tile has at most.
    """

    tiles: Tensor
    known: Tensor
    times: Tensor
    block: int


@tuned(CONFIGS, key=("HEAD", "PAGE", "block_queries", "FP8", "POINTWISE", "BIASED"), suits=in_a_page)
@triton.jit
def _attend(
    out, qkv, tiles, known, row_times, pool, scales,
    page_times, table, temperature, positions, times,
    layer, layers, num_tiles, most_pages, qkv_group, qkv_row, out_group, time_group,
    inverse_length, HEADS: tl.constexpr, HEAD: tl.constexpr, ROOM: tl.constexpr, PAGE: tl.constexpr,
    DISTANCES: tl.constexpr, POINTWISE: tl.constexpr, BIASED: tl.constexpr, FP8: tl.constexpr,
    block_queries: tl.constexpr, block_keys: tl.constexpr,
):  # fmt: skip
    """One tile of rows, one head, one block of the model."""
    head, block, blocks = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    tile = tiles + (block * num_tiles + tl.program_id(0)) * 4
    user, first, before, rows = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    if user < 0:
        return
    seat = user * blocks + block
    lane, columns = tl.arange(0, block_queries), tl.arange(0, ROOM)
    real = lane < rows
    row, inside = first + lane, real[:, None] & (columns < HEAD)[None, :]
    queries = tl.load(
        qkv + block.to(tl.int64) * qkv_group + row[:, None] * qkv_row + (head * HEAD + columns)[None, :],
        mask=inside, other=0.0,
    )  # fmt: skip
    moments = tl.load(row_times + block * time_group + row, mask=real, other=0)
    place = tl.load(known + seat) + before + lane
    of_head = (block * layers + layer) * HEADS + head
    warmth = tl.load(temperature + of_head)
    top = tl.full((block_queries,), MASKED, tl.float32)
    total = tl.zeros((block_queries,), tl.float32)
    mixed = tl.zeros((block_queries, ROOM), tl.float32)
    visible = tl.load(known + seat) + before + rows
    for start in range(0, visible, block_keys):
        page = tl.load(table + seat * most_pages + start // PAGE).to(tl.int64)
        key = start + tl.arange(0, block_keys)
        there = key < visible
        in_page = start % PAGE + tl.arange(0, block_keys)
        begin = (page * layers + layer) * (2 * PAGE)  # a pool may have more than 2^31 numbers, a page has not
        stored, their_scales = pool + begin * (HEADS * HEAD), scales + begin * HEADS
        keys, key_scale = rows_at(stored, their_scales, in_page, there, columns, head, HEADS, HEAD, FP8)
        values, value_scale = rows_at(stored, their_scales, in_page + PAGE, there, columns, head, HEADS, HEAD, FP8)
        logits = product(queries, tl.trans(keys.to(queries.dtype)), tl.zeros((block_queries, block_keys), tl.float32))
        logits = logits * (warmth * key_scale)[None, :]
        if BIASED:
            then = tl.load(page_times + page * PAGE + in_page, mask=there, other=0)
            logits += relative_bias(
                positions + of_head * DISTANCES, times + of_head * 48,
                place[:, None] - key[None, :], moments[:, None] - then[None, :], DISTANCES,
            )  # fmt: skip
        seen = key[None, :] <= place[:, None]
        seen = seen & there[None, :]
        top, total, mixed = weighed(
            top, total, mixed, logits, seen, values, value_scale, inverse_length, queries.dtype, POINTWISE
        )
    if not POINTWISE:
        mixed = mixed / tl.where(real, total, 1.0)[:, None]
    target = out + block.to(tl.int64) * out_group + row[:, None] * (HEADS * HEAD) + (head * HEAD + columns)[None, :]
    tl.store(target, narrowed(mixed, out.dtype.element_ty), mask=inside)


def attend_history(
    out: Tensor, qkv: Tensor, rows: HistoryRows, states: PagedStates, tables: AttentionTables, layer
) -> None:
    """Write out (N, R, A) of queries, keys and values qkv (N, R, 3 A or more); rows that no tile has stay as they are.

    The keys and values of the rows are read from the pages, where `triton_state_rows.py` has put them.
    """
    blocks, width = qkv.shape[0], out.shape[-1]
    head, num_tiles = width // tables.heads, rows.tiles.shape[1]
    positions, times = tables.positions, tables.times
    _attend[(num_tiles, tables.heads, blocks)](
        out, qkv, rows.tiles, rows.known, rows.times, states.keys_values, states.scales,
        states.times, states.table, tables.temperature,
        tables.temperature if positions is None else positions, tables.temperature if times is None else times,
        layer, states.layers, num_tiles, states.table.shape[2], qkv.stride(0), qkv.stride(1), out.stride(0),
        rows.times.stride(0),
        tables.inverse_length, HEADS=tables.heads, HEAD=head, ROOM=room_of(head), PAGE=states.page,
        DISTANCES=tables.distances, POINTWISE=tables.weighting is Weighting.POINTWISE, BIASED=positions is not None,
        FP8=states.fp8, block_queries=rows.block,
    )  # fmt: skip
