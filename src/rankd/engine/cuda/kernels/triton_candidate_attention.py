"""Candidates attend to the whole history of their user and to themselves, never to each other: no (C, C) work at all.

A candidate stands right after the history and at the moment of the request, so the bias is the same for all candidates
of a user: one row a block of keys. A candidate's own key is where the online sum starts.
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
from rankd.engine.cuda.kernels.triton_pieces import activated, narrowed, product, room_of, tuned
from rankd.engine.cuda.paged_states import PagedStates


@dataclass(frozen=True, slots=True)
class CandidateRows:
    """Which rows are whose: tiles (X, 4) int32, see `TILE_COLUMNS`, the same for all blocks.

    lengths (U, N) int32 events of each history; now (U,) int32. `block` is how many rows a tile has at most.
    """

    tiles: Tensor
    lengths: Tensor
    now: Tensor
    block: int


@tuned(CONFIGS, key=("HEAD", "PAGE", "block_queries", "FP8", "POINTWISE", "BIASED"), suits=in_a_page)
@triton.jit
def _attend(
    out, qkv, tiles, lengths, now, pool, scales,
    page_times, table, temperature, positions, times,
    layer, layers, most_pages, qkv_group, qkv_row, out_group,
    inverse_length, HEADS: tl.constexpr, HEAD: tl.constexpr, ROOM: tl.constexpr, PAGE: tl.constexpr,
    DISTANCES: tl.constexpr, POINTWISE: tl.constexpr, BIASED: tl.constexpr, FP8: tl.constexpr,
    block_queries: tl.constexpr, block_keys: tl.constexpr,
):  # fmt: skip
    """One tile of candidates, one head, one block of the model."""
    head, block, blocks = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    tile = tiles + tl.program_id(0) * 4
    user, first, rows = tl.load(tile), tl.load(tile + 1), tl.load(tile + 3)
    if user < 0:
        return
    seat = user * blocks + block
    lane, columns = tl.arange(0, block_queries), tl.arange(0, ROOM)
    real = lane < rows
    row, inside = first + lane, real[:, None] & (columns < HEAD)[None, :]
    own = qkv + block.to(tl.int64) * qkv_group + row[:, None] * qkv_row + (head * HEAD + columns)[None, :]
    queries = tl.load(own, mask=inside, other=0.0)
    own_keys = tl.load(own + HEADS * HEAD, mask=inside, other=0.0)
    own_values = tl.load(own + 2 * HEADS * HEAD, mask=inside, other=0.0)
    of_head = (block * layers + layer) * HEADS + head
    warmth = tl.load(temperature + of_head)
    itself = tl.sum(queries.to(tl.float32) * own_keys.to(tl.float32), 1) * warmth
    if BIASED:
        itself += tl.load(positions + of_head * DISTANCES) + tl.load(times + of_head * 48)
    top = itself
    total = tl.full((block_queries,), 1.0, tl.float32)
    mixed = own_values.to(tl.float32)
    if POINTWISE:
        mixed = mixed * (activated(itself, "silu") * inverse_length)[:, None]
    length = tl.load(lengths + seat)
    moment = tl.load(now + user)
    for start in range(0, length, block_keys):
        page = tl.load(table + seat * most_pages + start // PAGE).to(tl.int64)
        key = start + tl.arange(0, block_keys)
        there = key < length
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
                positions + of_head * DISTANCES, times + of_head * 48, length - key, moment - then, DISTANCES
            )[None, :]
        top, total, mixed = weighed(
            top, total, mixed, logits, there[None, :], values, value_scale, inverse_length, queries.dtype, POINTWISE
        )
    if not POINTWISE:
        mixed = mixed / total[:, None]
    target = out + block.to(tl.int64) * out_group + row[:, None] * (HEADS * HEAD) + (head * HEAD + columns)[None, :]
    tl.store(target, narrowed(mixed, out.dtype.element_ty), mask=inside)


def attend_candidates(
    out: Tensor, qkv: Tensor, rows: CandidateRows, states: PagedStates, tables: AttentionTables, layer
) -> None:
    """Write out (N, R, A) of the candidates' queries, keys and values qkv (N, R, 3 A or more)."""
    blocks, width = qkv.shape[0], out.shape[-1]
    head = width // tables.heads
    positions, times = tables.positions, tables.times
    _attend[(rows.tiles.shape[0], tables.heads, blocks)](
        out, qkv, rows.tiles, rows.lengths, rows.now, states.keys_values, states.scales,
        states.times, states.table, tables.temperature,
        tables.temperature if positions is None else positions, tables.temperature if times is None else times,
        layer, states.layers, states.table.shape[2], qkv.stride(0), qkv.stride(1), out.stride(0),
        tables.inverse_length, HEADS=tables.heads, HEAD=head, ROOM=room_of(head), PAGE=states.page,
        DISTANCES=tables.distances, POINTWISE=tables.weighting is Weighting.POINTWISE, BIASED=positions is not None,
        FP8=states.fp8, block_queries=rows.block,
    )  # fmt: skip
