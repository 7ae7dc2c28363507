"""What follows HSTU's attention in one kernel: the norm of what was attended, the gates, the projection, the residual.

    out = x + [ u x norm(a) ] @ weight^T + bias                 the paper's form (arXiv 2402.17152)
    out = x + [ u, a, u x norm(a) ] @ weight^T + bias           that of MLPerf's dlrm-v3

The parts side by side are never in memory: each is made of `u` and `a` where it meets its part of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from rankd.engine.cuda.kernels.triton_pieces import config, mean_and_spread, narrowed, product, tiles_of, tuned

CONFIGS = (
    config(4, 3, block_rows=32, block_outputs=64, block_inputs=64),
    config(4, 2, block_rows=16, block_outputs=32, block_inputs=32),
    config(8, 3, block_rows=64, block_outputs=64, block_inputs=32),
    config(8, 3, block_rows=64, block_outputs=128, block_inputs=64),
    config(8, 3, block_rows=128, block_outputs=128, block_inputs=32),
)


@dataclass(frozen=True, slots=True)
class GatedOutput:
    """weight (G, O, P A) in the type of the arithmetic, P = 1 or 3 parts as above; bias (G, O) float32; norm (G, 2, A)
    float32: weight, then bias; `epsilon` stands beside the variance."""

    weight: Tensor
    bias: Tensor
    norm: Tensor
    epsilon: float


@tuned(CONFIGS, key=("WIDTH", "OUTPUTS", "PARTS", "capacity"), restored=("x",))
@triton.jit
def _finish(
    x, attended, gates, weight, bias, norm, counts, capacity, x_group, attended_group, gates_group, gates_row,
    weight_group, epsilon, WIDTH: tl.constexpr, OUTPUTS: tl.constexpr, PARTS: tl.constexpr,
    block_rows: tl.constexpr, block_outputs: tl.constexpr, block_inputs: tl.constexpr,
):  # fmt: skip
    """One tile of rows and outputs of one group, in place: nobody else reads these numbers of x."""
    group = tl.program_id(1).to(tl.int64)
    across: tl.constexpr = (OUTPUTS + block_outputs - 1) // block_outputs
    first = tl.program_id(0) // across * block_rows
    count = tl.load(counts + group)
    if first >= count:
        return
    row = first + tl.arange(0, block_rows)
    real = row < count
    column = tl.program_id(0) % across * block_outputs + tl.arange(0, block_outputs)
    wanted = column < OUTPUTS
    lane = tl.arange(0, block_inputs)
    rows = attended + group * attended_group + row[:, None] * WIDTH
    mean, spread = mean_and_spread(rows, real, lane, epsilon, WIDTH, block_rows, block_inputs)
    theirs = gates + group * gates_group + row[:, None] * gates_row
    weights = weight + group * weight_group + column[None, :] * (PARTS * WIDTH)
    about = norm + group * (2 * WIDTH)
    total = tl.zeros((block_rows, block_outputs), tl.float32)
    for start in range(0, WIDTH, block_inputs):
        there = start + lane < WIDTH
        inside, taken = real[:, None] & there[None, :], wanted[None, :] & there[:, None]
        come = tl.load(rows + (start + lane)[None, :], mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(theirs + (start + lane)[None, :], mask=inside, other=0.0).to(tl.float32)
        normed = (come - mean[:, None]) * spread[:, None] * tl.load(about + start + lane, there, 0.0)[None, :]
        normed += tl.load(about + WIDTH + start + lane, there, 0.0)[None, :]
        gated = tl.where(inside, gate * normed, 0.0)
        against = weights + (start + lane)[:, None]
        if PARTS == 3:
            with_gate = tl.load(against, mask=taken, other=0.0)
            total = product(narrowed(gate, with_gate.dtype), with_gate, total)
            with_come = tl.load(against + WIDTH, mask=taken, other=0.0)
            total = product(narrowed(come, with_come.dtype), with_come, total)
        with_gated = tl.load(against + (PARTS - 1) * WIDTH, mask=taken, other=0.0)
        total = product(narrowed(gated, with_gated.dtype), with_gated, total)
    total += tl.load(bias + group * OUTPUTS + column, mask=wanted, other=0.0)[None, :]
    place = x + group * x_group + row[:, None] * OUTPUTS + column[None, :]
    inside = real[:, None] & wanted[None, :]
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


def finish_gated(x: Tensor, attended: Tensor, gates: Tensor, layer: GatedOutput, counts: Tensor) -> None:
    """Add to x (G, R, O) float32 what attended and gates (G, R, A) lead to, of group g the first counts[g] rows.

    `gates` may have any strides but the last; counts (G,) int32.
    """
    groups, capacity, width = attended.shape
    outputs = x.shape[2]

    def grid(chosen: dict[str, int]) -> tuple[int, int]:
        return tiles_of(capacity, chosen["block_rows"]) * tiles_of(outputs, chosen["block_outputs"]), groups

    _finish[grid](
        x, attended, gates, layer.weight, layer.bias, layer.norm, counts, capacity, x.stride(0), attended.stride(0),
        gates.stride(0), gates.stride(1), layer.weight.stride(0), layer.epsilon, WIDTH=width, OUTPUTS=outputs,
        PARTS=layer.weight.shape[2] // width,
    )  # fmt: skip
