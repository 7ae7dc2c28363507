"""The feed-forward of a layer in one kernel: norm, up, activation (or gate), down, residual. Nothing hidden leaves.

    out = x + down( activation(up(norm(x))) )                       plain
    out = x + down( activation(up(norm(x))) x gate(norm(x)) )       gated

A program keeps its rows whole, so that the width is bounded by what a processor holds (`WIDEST_BYTES`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankd.engine.cuda.kernels.fastest_way import FastestWay, Way
from rankd.engine.cuda.kernels.triton_pieces import activated, config, narrowed, product, room_of, tiles_of, tuned
from rankd.engine.cuda.kernels.triton_projection import EPSILON, Linear, project

WIDEST_BYTES = 1024
"""Of a row of weights: 512 numbers in bfloat16, 256 in float32, with which all block sizes fit an H200."""
FEED_FORWARDS = FastestWay("feed-forward")
CONFIGS = (
    config(8, 2, block_rows=32, block_hidden=64),
    config(4, 2, block_rows=16, block_hidden=16),
    config(4, 2, block_rows=16, block_hidden=32),
    config(4, 2, block_rows=32, block_hidden=32),
    config(8, 2, block_rows=64, block_hidden=32),
    config(8, 1, block_rows=64, block_hidden=64),
)


@dataclass(frozen=True, slots=True)
class FeedForward:
    """up (G, F, D), or (G, 2 F, D) with the gate's rows after; up_bias (G, F or 2 F); down (G, D, F); down_bias (G, D).

    Weights in the type of the arithmetic with the norm folded into `up`, biases float32.
    """

    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor
    activation: str = "gelu"
    gated: bool = False


@tuned(CONFIGS, key=("WIDTH", "HIDDEN", "capacity"), restored=("x",))
@triton.jit
def _feed_forward(
    x, up, up_bias, down, down_bias, counts, capacity, x_group, epsilon,
    WIDTH: tl.constexpr, ROOM: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    block_rows: tl.constexpr, block_hidden: tl.constexpr,
):  # fmt: skip
    """A tile of whole rows of one group, in place."""
    group = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * block_rows
    count = tl.load(counts + group)
    if first >= count:
        return
    row, column = first + tl.arange(0, block_rows), tl.arange(0, ROOM)
    inside = (row < count)[:, None] & (column < WIDTH)[None, :]
    place = x + group * x_group + row[:, None] * WIDTH + column[None, :]
    numbers = tl.load(place, mask=inside, other=0.0)
    mean = tl.sum(numbers, 1) / WIDTH
    rest = tl.where(inside, numbers - mean[:, None], 0.0)
    normed = rest * (1.0 / tl.sqrt(tl.sum(rest * rest, 1) / WIDTH + epsilon))[:, None]
    normed = narrowed(normed, up.dtype.element_ty)
    lane = tl.arange(0, block_hidden)
    rows_up: tl.constexpr = (2 if GATED else 1) * HIDDEN
    ups, ups_bias, downs = up + group * (rows_up * WIDTH), up_bias + group * rows_up, down + group * (WIDTH * HIDDEN)
    total = tl.zeros((block_rows, ROOM), tl.float32)
    for start in range(0, HIDDEN, block_hidden):
        there = start + lane < HIDDEN
        taken = there[None, :] & (column < WIDTH)[:, None]
        into = tl.load(ups + (start + lane)[None, :] * WIDTH + column[:, None], mask=taken, other=0.0)
        hidden = product(normed, into, tl.zeros((block_rows, block_hidden), tl.float32))
        hidden = activated(hidden + tl.load(ups_bias + start + lane, mask=there, other=0.0)[None, :], ACTIVATION)
        if GATED:
            gates = HIDDEN + start + lane
            into = tl.load(ups + gates[None, :] * WIDTH + column[:, None], mask=taken, other=0.0)
            gate = product(normed, into, tl.zeros((block_rows, block_hidden), tl.float32))
            hidden = hidden * (gate + tl.load(ups_bias + gates, mask=there, other=0.0)[None, :])
        hidden = narrowed(tl.where(there[None, :], hidden, 0.0), up.dtype.element_ty)
        back = tl.load(downs + column[None, :] * HIDDEN + (start + lane)[:, None],
                       mask=there[:, None] & (column < WIDTH)[None, :], other=0.0)  # fmt: skip
        total = product(hidden, back, total)
    total += tl.load(down_bias + group * WIDTH + column, mask=column < WIDTH, other=0.0)[None, :]
    tl.store(place, numbers + total, mask=inside)


def feed_forward(x: Tensor, layer: FeedForward, counts: Tensor) -> None:
    """Replace x (G, R, D) float32, of group g the first counts[g] rows; D up to WIDEST_BYTES.

    In one kernel or, where there is no gate, in two projections, whichever is faster.
    """
    ways: dict[str, Way] = {"fused": partial(feed_forward_fused, x, layer, counts)}
    if not layer.gated:
        ways["projections"] = partial(feed_forward_in_two, x, layer, counts)
    FEED_FORWARDS.run((tuple(x.shape), tuple(layer.up.shape), layer.up.dtype), ways, (x,))


def feed_forward_fused(x: Tensor, layer: FeedForward, counts: Tensor) -> None:
    """`feed_forward` in one kernel."""
    groups, capacity, width = x.shape
    _feed_forward[lambda chosen: (tiles_of(capacity, chosen["block_rows"]), groups)](
        x, layer.up, layer.up_bias, layer.down, layer.down_bias, counts, capacity, x.stride(0), EPSILON,
        WIDTH=width, ROOM=room_of(width), HIDDEN=layer.down.shape[2], ACTIVATION=layer.activation, GATED=layer.gated,
    )  # fmt: skip


def feed_forward_in_two(x: Tensor, layer: FeedForward, counts: Tensor) -> None:
    """`feed_forward` without a gate as two projections, with what is hidden in memory."""
    hidden = torch.empty((*x.shape[:2], layer.down.shape[2]), dtype=layer.up.dtype, device=x.device)
    project(hidden, x, Linear(layer.up, layer.up_bias, True, layer.activation), counts)
    project(x, hidden, Linear(layer.down, layer.down_bias), counts, residual=x)
