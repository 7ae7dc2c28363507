"""What stands around a matrix product that the library computes: the norm of its rows before, and bias, activation,
residual or gate after. `triton_projection.py` has all of this in one kernel; which is faster is measured there."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rankd.engine.cuda.kernels.triton_pieces import after_product, config, narrowed, room_of, tiles_of, tuned

NORMALISE = (config(4, 1, block_rows=4), *(config(w, 1, block_rows=rows) for rows, w in ((1, 4), (8, 8))))
FINISH = (
    config(4, 1, block_rows=8, block_outputs=128),
    *(config(w, 1, block_rows=rows, block_outputs=256) for rows, w in ((4, 4), (16, 8))),
)


@tuned(NORMALISE, key=("INPUTS", "capacity"))
@triton.jit
def _normalise(
    made, x, counts, capacity, x_group, x_row, epsilon, INPUTS: tl.constexpr, ROOM: tl.constexpr, NORMED: tl.constexpr,
    block_rows: tl.constexpr,
):  # fmt: skip
    """A tile of whole rows of one group."""
    group = tl.program_id(1).to(tl.int64)
    row, column = tl.program_id(0) * block_rows + tl.arange(0, block_rows), tl.arange(0, ROOM)
    inside = (row < tl.load(counts + group))[:, None] & (column < INPUTS)[None, :]
    numbers = tl.load(x + group * x_group + row[:, None] * x_row + column[None, :], mask=inside, other=0.0)
    numbers = numbers.to(tl.float32)
    if NORMED:
        rest = tl.where(inside, numbers - (tl.sum(numbers, 1) / INPUTS)[:, None], 0.0)
        numbers = rest * (1.0 / tl.sqrt(tl.sum(rest * rest, 1) / INPUTS + epsilon))[:, None]
    target = made + (group * capacity + row)[:, None] * INPUTS + column[None, :]
    tl.store(target, narrowed(numbers, made.dtype.element_ty), mask=inside)


@tuned(FINISH, key=("OUTPUTS", "capacity"), restored=("out",))
@triton.jit
def _finish(
    out, made, bias, other, counts, capacity, bias_group, out_group, out_row, other_group, other_row,
    OUTPUTS: tl.constexpr, ACTIVATION: tl.constexpr, ACTIVATED_FROM: tl.constexpr, RESIDUAL: tl.constexpr,
    GATED: tl.constexpr, block_rows: tl.constexpr, block_outputs: tl.constexpr,
):  # fmt: skip
    """A tile of rows and outputs of one group."""
    group = tl.program_id(1).to(tl.int64)
    across: tl.constexpr = (OUTPUTS + block_outputs - 1) // block_outputs
    row = tl.program_id(0) // across * block_rows + tl.arange(0, block_rows)
    column = tl.program_id(0) % across * block_outputs + tl.arange(0, block_outputs)
    wanted = column < OUTPUTS
    inside = (row < tl.load(counts + group))[:, None] & wanted[None, :]
    total = tl.load(made + (group * capacity + row)[:, None] * OUTPUTS + column[None, :], mask=inside, other=0.0)
    total = total.to(tl.float32) + tl.load(bias + group * bias_group + column, mask=wanted, other=0.0)[None, :]
    theirs = other + group * other_group + row[:, None] * other_row + column[None, :]
    total = after_product(total, theirs, column, inside, ACTIVATION, ACTIVATED_FROM, RESIDUAL, GATED)
    target = out + group * out_group + row[:, None] * out_row + column[None, :]
    tl.store(target, narrowed(total, out.dtype.element_ty), mask=inside)


def rows_for_product(made: Tensor, x: Tensor, counts: Tensor, normed: bool, epsilon: float) -> None:
    """Write made (G, R, I) of x (G, R, I), in the type of `made`: normalised, or only narrowed."""
    groups, capacity, inputs = x.shape
    _normalise[lambda chosen: (tiles_of(capacity, chosen["block_rows"]), groups)](
        made, x, counts, capacity, x.stride(0), x.stride(1), epsilon, INPUTS=inputs, ROOM=room_of(inputs),
        NORMED=normed,
    )  # fmt: skip


def finish_product(
    out: Tensor,
    made: Tensor,
    bias: Tensor,
    counts: Tensor,
    activation: str,
    activated_from: int,
    residual: Tensor | None,
    gated: Tensor | None,
) -> None:
    """Write out (G, R, O) of the products made (G, R, O); bias (G, O), or (1, O) for all groups."""
    groups, capacity, outputs = made.shape
    other = residual if residual is not None else gated if gated is not None else out

    def grid(chosen: dict[str, int]) -> tuple[int, int]:
        return tiles_of(capacity, chosen["block_rows"]) * tiles_of(outputs, chosen["block_outputs"]), groups

    _finish[grid](
        out, made, bias, other, counts, capacity, 0 if bias.shape[0] == 1 else bias.stride(0), out.stride(0),
        out.stride(1), other.stride(0), other.stride(1), OUTPUTS=outputs, ACTIVATION=activation,
        ACTIVATED_FROM=activated_from, RESIDUAL=residual is not None, GATED=gated is not None,
    )  # fmt: skip
