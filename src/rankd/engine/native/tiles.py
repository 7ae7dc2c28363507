"""The matrix products' innermost loop: a tile of 12, 4 or 1 rows and 32 columns, kept in registers over the whole of K.

In: addresses of bfloat16 rows and of a packed panel (`weight_panels.py`). Out: the tile, finished (bias, activation)
before it leaves the registers. Next: `products.py`, which covers a matrix with tiles.

    rows     row r, K numbers, at rows + r x rows_stride
    panel    (K / 2, 32 columns, 2): two numbers of one column side by side, as AVX512-BF16 multiplies them

24 of 32 registers hold sums. With 12 x 32 tiles one thread of a Zen 4 reached 229 GF/s, its peak, and 4 x 32 (8 sums,
just above the instruction's 6 cycles) 224; 6 x 64 fell to 119 with K = 1024 (panels larger than the first-level cache).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from rankd.engine.native.vector_code import (
    FLOAT,
    FLOATS,
    INT,
    INTS,
    LANES,
    PAIRS,
    Code,
    Value,
    emitted,
    everywhere,
    fma,
    gelu,
    identity,
    load,
    load_bf16,
    multiply_pairs,
    number,
    relu,
    repeat,
    sigmoid,
    silu,
    spread,
    store,
    store_bf16,
    types,
)

COLUMNS = 2 * LANES
HEIGHTS = (12, 4, 1)

# (code, sums of 16 columns, row, which half of the columns, where they go, auxiliary address)
Finish = Callable[[Code, Value, int, int, Value, Value], None]


def sums(code: Code, height: int, rows: Value, stride: Value, panel: Value, pairs: Value) -> list[tuple[Value, Value]]:
    """The tile's sums, FLOATS each: for every row the first 16 columns and the next 16."""
    starts = [code.add(rows, code.mul(stride, number(row))) for row in range(height)]

    def step(place: Value, held: list[Value]) -> list[Value]:
        here = code.add(panel, code.shl(place, number(7)))
        weights = [load(code, code.add(here, number(64 * half)), PAIRS, 64) for half in (0, 1)]
        made = []
        for row, start in enumerate(starts):
            pair = load(code, code.add(start, code.shl(place, number(2))), INT, 2)
            both = code.bitcast(everywhere(code, pair, INTS), PAIRS)
            made += [multiply_pairs(code, held[2 * row + half], both, weights[half]) for half in (0, 1)]
        return made

    made = repeat(code, pairs, [spread(0.0)] * (2 * height), step)
    return list(zip(made[::2], made[1::2], strict=True))


def to_bf16(activation: Callable[[Code, Value], Value]) -> Finish:
    """bfloat16 of activation(sum + bias); the auxiliary address is the bias's."""

    def finish(code: Code, total: Value, _row: int, half: int, out: Value, aux: Value) -> None:
        biased = code.fadd(total, load(code, code.add(aux, number(64 * half)), FLOATS))
        store_bf16(code, activation(code, biased), code.add(out, number(32 * half)))

    return finish


def _raw(code: Code, total: Value, _row: int, half: int, out: Value, _aux: Value) -> None:
    store(code, total, code.add(out, number(64 * half)))


def _add(code: Code, total: Value, _row: int, half: int, out: Value, aux: Value) -> None:
    there = code.add(out, number(64 * half))
    biased = code.fadd(total, load(code, code.add(aux, number(64 * half)), FLOATS))
    store(code, code.fadd(load(code, there, FLOATS), biased), there)


def _gate(code: Code, total: Value, _row: int, half: int, out: Value, aux: Value) -> None:
    there = code.add(out, number(64 * half))
    biased = code.fadd(total, load(code, code.add(aux, number(64 * half)), FLOATS))
    store(code, code.fmul(load(code, there, FLOATS), sigmoid(code, biased)), there)


def _scale(code: Code, total: Value, row: int, half: int, out: Value, aux: Value) -> None:
    factor = everywhere(code, load(code, code.add(aux, number(4 * row)), FLOAT), FLOATS)
    store_bf16(code, code.fmul(total, factor), code.add(out, number(32 * half)))


def _tile(name: str, height: int, finish: Finish) -> Any:
    def tile(
        code: Code, rows: Value, stride: Value, panel: Value, pairs: Value, out: Value, out_stride: Value, aux: Value
    ) -> None:
        for row, halves in enumerate(sums(code, height, rows, stride, panel, pairs)):
            there = code.add(out, code.mul(out_stride, number(row)))
            for half, total in enumerate(halves):
                finish(code, total, row, half, there, aux)

    tile.__name__ = f"{name}_{height}"
    return emitted(types.void(*[types.intp] * 7), tile)


def _own_tile(height: int) -> Any:
    """As "scale", but a row's own value, weighted, is added first: the candidate that attends to itself.

    aux holds 16 factors 1 / sum, then 16 weights of the own value; own values are bfloat16 rows.
    """

    def tile(
        code: Code, rows: Value, stride: Value, panel: Value, pairs: Value, out: Value, out_stride: Value, aux: Value,
        own: Value, own_stride: Value,
    ) -> None:  # fmt: skip
        for row, halves in enumerate(sums(code, height, rows, stride, panel, pairs)):
            there = code.add(out, code.mul(out_stride, number(row)))
            mine = code.add(own, code.mul(own_stride, number(row)))
            factor, weight = (
                everywhere(code, load(code, code.add(aux, number(4 * row + 64 * which)), FLOAT), FLOATS)
                for which in (0, 1)
            )
            for half, total in enumerate(halves):
                with_own = fma(code, weight, load_bf16(code, code.add(mine, number(32 * half))), total)
                store_bf16(code, code.fmul(with_own, factor), code.add(there, number(32 * half)))

    tile.__name__ = f"own_{height}"
    return emitted(types.void(*[types.intp] * 9), tile)


def _heights(name: str, finish: Finish) -> tuple[Any, Any, Any]:
    make = partial(_tile, name, finish=finish)
    return make(HEIGHTS[0]), make(HEIGHTS[1]), make(HEIGHTS[2])


RAW = _heights("raw", _raw)
SCALE = _heights("scale", _scale)
ADD = _heights("add", _add)
GATE = _heights("gate", _gate)
LINEAR = _heights("linear", to_bf16(identity))
GELU = _heights("gelu", to_bf16(gelu))
SILU = _heights("silu", to_bf16(silu))
RELU = _heights("relu", to_bf16(relu))
OWN = tuple(_own_tile(height) for height in HEIGHTS)
