"""A linear layer with what stands around it: layer norm before, activation, residual or gate after; in one kernel.

    out = gate( activation( norm(x) @ weight^T + bias ) + residual )      gate(y) = other x sigmoid(y)

Groups are computed in one launch: each has its own rows and, unless their stride is 0, its own weights. The norm is
computed from float32 rows in two passes (mean, then squares of what is left); its weight and bias are folded into the
layer's when weights are loaded. The other way is the library's matrix product between two small kernels
(`triton_around_product.py`); the faster one is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankd.engine.cuda.kernels.fastest_way import FastestWay
from rankd.engine.cuda.kernels.triton_around_product import finish_product, rows_for_product
from rankd.engine.cuda.kernels.triton_pieces import (
    after_product,
    config,
    mean_and_spread,
    narrowed,
    product,
    tiles_of,
    tuned,
)

EPSILON = 1e-5  # of nn.LayerNorm
CONFIGS = (
    config(4, 3, block_rows=32, block_outputs=64, block_inputs=64),
    config(4, 2, block_rows=16, block_outputs=32, block_inputs=32),
    config(4, 3, block_rows=64, block_outputs=64, block_inputs=64),
    config(4, 3, block_rows=64, block_outputs=128, block_inputs=64),
    config(8, 3, block_rows=128, block_outputs=128, block_inputs=32),
    config(8, 3, block_rows=128, block_outputs=128, block_inputs=64),
)


PROJECTIONS = FastestWay("projection")


@dataclass(frozen=True, slots=True)
class Linear:
    """weight (G, O, I) as torch has it, in the type of the arithmetic; bias (G, O) float32. G may be 1 for all groups.

    `normed`: the rows are normalised first, with `epsilon` beside their variance. `activation`: "", "gelu", "silu" or
    "relu", of the outputs from number `activated_from` on.
    """

    weight: Tensor
    bias: Tensor
    normed: bool = False
    activation: str = ""
    activated_from: int = 0
    epsilon: float = EPSILON


@tuned(CONFIGS, key=("INPUTS", "OUTPUTS", "NORMED", "capacity"), restored=("out",))
@triton.jit
def _project(
    out, x, weight, bias, other, counts, capacity, x_group, x_row, weight_group, bias_group, out_group, out_row,
    other_group, other_row, epsilon, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, NORMED: tl.constexpr,
    ACTIVATION: tl.constexpr, ACTIVATED_FROM: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    block_rows: tl.constexpr, block_outputs: tl.constexpr, block_inputs: tl.constexpr,
):  # fmt: skip
    """One tile of rows and outputs of one group. Within a group numbers are counted in 32 bits: they fit registers."""
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
    rows = x + group * x_group + row[:, None] * x_row
    mean = tl.zeros((block_rows,), tl.float32)
    spread = tl.full((block_rows,), 1.0, tl.float32)
    if NORMED:
        mean, spread = mean_and_spread(rows, real, lane, epsilon, INPUTS, block_rows, block_inputs)
    total = tl.zeros((block_rows, block_outputs), tl.float32)
    for start in range(0, INPUTS, block_inputs):
        there = start + lane < INPUTS
        part = tl.load(rows + (start + lane)[None, :], mask=real[:, None] & there[None, :], other=0.0)
        if NORMED:
            part = tl.where(there[None, :], (part.to(tl.float32) - mean[:, None]) * spread[:, None], 0.0)
        against = tl.load(weight + group * weight_group + column[None, :] * INPUTS + (start + lane)[:, None],
                          mask=wanted[None, :] & there[:, None], other=0.0)  # fmt: skip
        total = product(narrowed(part.to(tl.float32), against.dtype), against, total)
    total += tl.load(bias + group * bias_group + column, mask=wanted, other=0.0)[None, :]
    inside = real[:, None] & wanted[None, :]
    theirs = other + group * other_group + row[:, None] * other_row + column[None, :]
    total = after_product(total, theirs, column, inside, ACTIVATION, ACTIVATED_FROM, RESIDUAL, GATED)
    target = out + group * out_group + row[:, None] * out_row + column[None, :]
    tl.store(target, narrowed(total, out.dtype.element_ty), mask=inside)


def project(
    out: Tensor,
    x: Tensor,
    layer: Linear,
    counts: Tensor,
    residual: Tensor | None = None,
    gated: Tensor | None = None,
) -> None:
    """Write out (G, R, O) of x (G, R, I), of group g the first counts[g] rows.

    All but the last dimension may have any strides. `residual` (G, R, O) is added and may be `out` itself; `gated` is
    multiplied by the sigmoid of the result instead. counts (G,) int32.
    """
    ways = {
        "fused": partial(project_fused, out, x, layer, counts, residual, gated),
        "library": partial(project_by_library, out, x, layer, counts, residual, gated),
    }
    after = "residual" if residual is not None else "gate" if gated is not None else ""
    shape = tuple(x.shape), layer.weight.shape[1], x.dtype, layer.weight.dtype, layer.normed, layer.activation, after
    PROJECTIONS.run(shape, ways, () if residual is None else (out,))


def project_fused(
    out: Tensor, x: Tensor, layer: Linear, counts: Tensor, residual: Tensor | None = None, gated: Tensor | None = None
) -> None:
    """`project` in one kernel."""
    groups, capacity, inputs = x.shape
    outputs = layer.weight.shape[1]
    other = residual if residual is not None else gated if gated is not None else out
    shared = layer.weight.shape[0] == 1

    def grid(chosen: dict[str, int]) -> tuple[int, int]:
        return tiles_of(capacity, chosen["block_rows"]) * tiles_of(outputs, chosen["block_outputs"]), groups

    _project[grid](
        out, x, layer.weight, layer.bias, other, counts, capacity, x.stride(0), x.stride(1),
        0 if shared else layer.weight.stride(0), 0 if shared else layer.bias.stride(0), out.stride(0), out.stride(1),
        other.stride(0), other.stride(1), layer.epsilon, INPUTS=inputs, OUTPUTS=outputs, NORMED=layer.normed,
        ACTIVATION=layer.activation, ACTIVATED_FROM=layer.activated_from, RESIDUAL=residual is not None,
        GATED=gated is not None,
    )  # fmt: skip


def project_by_library(
    out: Tensor, x: Tensor, layer: Linear, counts: Tensor, residual: Tensor | None = None, gated: Tensor | None = None
) -> None:
    """`project` around torch.bmm. All rows are multiplied, those of nobody too; the graph that this is recorded in owns
    what lies between the steps."""
    weight = layer.weight
    rows = x
    if layer.normed or x.dtype is not weight.dtype:
        rows = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
        rows_for_product(rows, x, counts, layer.normed, layer.epsilon)
    made = torch.bmm(rows, weight.transpose(1, 2).expand(len(x), -1, -1))
    finish_product(out, made, layer.bias, counts, layer.activation, layer.activated_from, residual, gated)


def folded(weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (O, I) and bias (O,) of a layer with the norm before it folded in, float32."""
    return weight * norm_weight, bias + torch.mv(weight, norm_bias)
