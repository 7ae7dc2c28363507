"""What several kernels share: products with float32 sums, the relative bias, activations, block sizes to choose from.

Triton's interpreter keeps bfloat16 as bits and multiplies those, so there everything is widened before it is used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
TIME_BUCKETS = tl.constexpr(48)  # of models.blocks
MASKED = tl.constexpr(-1e30)  # finite: a row whose keys are all masked stays a number
LOG2_E = 1.4426950408889634  # softmax takes powers of 2: the factor goes into temperatures and biases
SMALLEST = 16
"""The least that a side of `tl.dot` may measure."""


def room_of(size: int) -> int:
    """The power of two that holds `size`, as blocks need it: at least SMALLEST.

    >>> room_of(48), room_of(3)
    (64, 16)
    """
    return max(SMALLEST, 1 << (size - 1).bit_length())


def tiles_of(rows: int, block: int) -> int:
    """How many blocks cover so many rows; at least one, for a grid has no empty side."""
    return max(-(-rows // block), 1)


TUNE = "RANKD_CUDA_TUNE"
"""An environment variable: "off" takes the first configuration of every kernel, for starts that may not take long."""

WARM_UP_MS, MEASURED_MS = 5, 20
Suits = Callable[[Mapping[str, Any], Mapping[str, Any]], bool]
"""Whether block sizes suit a kernel's arguments."""


def measures() -> bool:
    """Whether block sizes and ways are chosen by measuring; else the first ones are taken."""
    return not bool(INTERPRETED) and os.environ.get(TUNE) != "off"


def tuned(
    configs: Sequence[triton.Config],
    key: Sequence[str],
    restored: Sequence[str] = (),
    suits: Suits = lambda blocks, arguments: True,
) -> Callable[[Any], Any]:
    """The fastest of `configs` for each value of `key`, measured at the first call; in the interpreter the first one.

    `restored` names arguments that the kernel changes in place: they are put back between measurements. Only
    configurations that `suits` lets through are tried; the first one has to suit whatever the arguments are.
    """
    chosen = list(configs) if measures() else list(configs[:1])

    def suitable(configs: Sequence[triton.Config], given: Mapping[str, Any], **more: Any) -> list[triton.Config]:
        return [one for one in configs if suits(one.kwargs, {**given, **more})]

    def decorate(kernel: Any) -> Any:
        return triton.autotune(
            configs=chosen,
            key=list(key),
            restore_value=list(restored) or None,
            prune_configs_by={"early_config_prune": suitable},
            do_bench=measured,
        )(kernel)

    return decorate


def measured(call: Callable[[], None], quantiles: Sequence[float] = (0.5,)) -> Any:
    """Milliseconds of a call on the GPU, its quantiles over MEASURED_MS: a start tries hundreds of configurations."""
    return triton.testing.do_bench(call, warmup=WARM_UP_MS, rep=MEASURED_MS, quantiles=quantiles)


def config(warps: int, stages: int, **blocks: int) -> triton.Config:
    """One choice of block sizes."""
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


@triton.jit
def product(a, b, total):
    """total + a @ b: of bfloat16 exact products, of float32 no rounding to tf32; sums in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def time_bucket(seconds):
    """The half-octave bucket of a time difference, as `models.blocks.time_bucket` has it."""
    minutes = (tl.maximum(seconds, 0).to(tl.float32) + 0.5) / 60.0
    return tl.minimum((2.0 * tl.log2(1.0 + minutes)).to(tl.int32), TIME_BUCKETS - 1)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in float32; finite for every finite x."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def activated(x, kind: tl.constexpr):
    """An activation by its name; GELU is the exact one, by the error function."""
    if kind == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif kind == "silu":
        x = x * sigmoid(x)
    elif kind == "relu":
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def narrowed(x, kind: tl.constexpr):
    """float32 x as `kind`, rounded to nearest, ties to even. The interpreter cuts off: there x is rounded before."""
    if INTERPRETED:
        if kind == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        elif kind == tl.float8e4nv:
            bits = x.to(tl.int32, bitcast=True)
            normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
            x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, normal)  # below 2^-6 in steps of 2^-9
    return x.to(kind)


@triton.jit
def mean_and_spread(
    rows, real, lane, epsilon, WIDTH: tl.constexpr, block_rows: tl.constexpr, block_inputs: tl.constexpr
):
    """What a layer norm takes from each row and multiplies by, (rows,) each: the mean, then 1 / sqrt(variance +
    epsilon) of what is left. `rows` are the addresses (rows, 1) of their first numbers."""
    mean = tl.zeros((block_rows,), tl.float32)
    for start in range(0, WIDTH, block_inputs):
        inside = real[:, None] & (start + lane < WIDTH)[None, :]
        mean += tl.sum(tl.load(rows + (start + lane)[None, :], mask=inside, other=0.0).to(tl.float32), 1)
    mean = mean / WIDTH
    squares = tl.zeros((block_rows,), tl.float32)
    for start in range(0, WIDTH, block_inputs):
        inside = real[:, None] & (start + lane < WIDTH)[None, :]
        part = tl.load(rows + (start + lane)[None, :], mask=inside, other=0.0).to(tl.float32) - mean[:, None]
        squares += tl.sum(tl.where(inside, part * part, 0.0), 1)
    return mean, 1.0 / tl.sqrt(squares / WIDTH + epsilon)


@triton.jit
def after_product(
    total, theirs, column, inside, ACTIVATION: tl.constexpr, ACTIVATED_FROM: tl.constexpr, RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """What follows a product and its bias: an activation of some columns, then a residual or gate, read at `theirs`."""
    total = tl.where((column >= ACTIVATED_FROM)[None, :], activated(total, ACTIVATION), total)
    if RESIDUAL or GATED:
        numbers = tl.load(theirs, mask=inside, other=0.0).to(tl.float32)
        total = numbers + total if RESIDUAL else numbers * sigmoid(total)
    return total
