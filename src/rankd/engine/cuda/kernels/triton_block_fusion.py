"""Bit-wise gating fusion of the blocks' outputs: for each candidate attention over its N blocks, which are few.

The projections around it and the gate Y = G x sigmoid(f(G)) are `triton_projection.py`'s.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rankd.engine.cuda.kernels.triton_pieces import MASKED, config, narrowed, room_of, tiles_of, tuned

CONFIGS = (config(4, 1, block_rows=16), *(config(4, 1, block_rows=rows) for rows in (8, 32)))


@tuned(CONFIGS, key=("BLOCKS", "HEAD", "capacity"))
@triton.jit
def _attend(
    out, qkv, count, capacity, qkv_group, out_group, scale,
    BLOCKS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, ROOM: tl.constexpr, block_rows: tl.constexpr,
):  # fmt: skip
    """A tile of candidates and one head: all queries, keys and values of all blocks."""
    head = tl.program_id(1)
    row, column = tl.program_id(0) * block_rows + tl.arange(0, block_rows), tl.arange(0, ROOM)
    inside = (row < tl.load(count))[:, None] & (column < HEAD)[None, :]
    width: tl.constexpr = HEADS * HEAD
    own = row[:, None] * (3 * width) + (head * HEAD + column)[None, :]
    for mine in range(BLOCKS):
        query = tl.load(qkv + mine * qkv_group + own, mask=inside, other=0.0).to(tl.float32) * scale
        top = tl.full((block_rows,), MASKED, tl.float32)
        total = tl.zeros((block_rows,), tl.float32)
        mixed = tl.zeros((block_rows, ROOM), tl.float32)
        for theirs in range(BLOCKS):
            at = qkv + theirs * qkv_group + own
            logit = tl.sum(query * tl.load(at + width, mask=inside, other=0.0).to(tl.float32), 1)
            higher = tl.maximum(top, logit)
            fade, weight = tl.exp2(top - higher), tl.exp2(logit - higher)
            total = total * fade + weight
            value = tl.load(at + 2 * width, mask=inside, other=0.0).to(tl.float32)
            mixed = mixed * fade[:, None] + value * weight[:, None]
            top = higher
        target = out + mine * out_group + row[:, None] * width + (head * HEAD + column)[None, :]
        tl.store(target, narrowed(mixed / total[:, None], out.dtype.element_ty), mask=inside)


def attend_blocks(out: Tensor, qkv: Tensor, count: Tensor, heads: int, scale: float) -> None:
    """Write out (N, R, A) of qkv (N, R, 3 A), the first count[0] rows; a logit is (q k) x scale in powers of two."""
    blocks, capacity, width = out.shape
    head = width // heads
    _attend[lambda chosen: (tiles_of(capacity, chosen["block_rows"]), heads)](
        out, qkv, count, capacity, qkv.stride(0), out.stride(0), scale,
        BLOCKS=blocks, HEADS=heads, HEAD=head, ROOM=room_of(head),
    )  # fmt: skip
