"""Turning keys and values over into panels, in registers. In and out: addresses. Next: `apart.py`, `layer_steps.py`."""

from __future__ import annotations

from rankd.engine.native.vector_code import (
    INT,
    INT64,
    INTS,
    LANES,
    Code,
    Value,
    emitted,
    ir,
    load,
    number,
    repeat,
    store,
    types,
)


def _transpose(code: Code, rows: list[Value]) -> list[Value]:
    """16 INTS turned over: lane r of result c is lane c of row r."""
    for half in (8, 4, 2, 1):
        low = [lane if not lane & half else LANES + (lane & ~half) for lane in range(LANES)]
        high = [(lane | half) if not lane & half else LANES + lane for lane in range(LANES)]
        made = list(rows)
        for row in (row for row in range(LANES) if not row & half):
            two = rows[row], rows[row + half]
            made[row], made[row + half] = (code.shuffle_vector(*two, ir.Constant(INTS, order)) for order in (low, high))
        rows = made
    return rows


def _pack_16_keys(code: Code, rows: Value, offset: Value, out: Value, blocks: Value) -> None:
    """16 keys of `blocks` x 32 numbers into half a panel: pair p of key t goes to out + 128 p + 4 t."""
    starts = [code.add(load(code, code.add(rows, number(8 * row)), INT64), offset) for row in range(LANES)]

    def block(step: Value, _held: list[Value]) -> list[Value]:
        there = code.add(out, code.mul(step, number(LANES * 128)))
        keys = [load(code, code.add(start, code.mul(step, number(64))), INTS) for start in starts]
        for pair, column in enumerate(_transpose(code, keys)):
            store(code, column, code.add(there, number(128 * pair)), 64)
        return []

    repeat(code, blocks, [], block)


def _pack_2_values(code: Code, rows: Value, offset: Value, out: Value, panels: Value, panel_bytes: Value) -> None:
    """Two neighbouring rows of values, interleaved, into their place of each panel of 32 columns."""
    kind = ir.VectorType(ir.IntType(16), 2 * LANES)
    order = [lane // 2 + 2 * LANES * (lane % 2) for lane in range(4 * LANES)]
    starts = [code.add(load(code, code.add(rows, number(8 * row)), INT64), offset) for row in range(2)]

    def panel(step: Value, _held: list[Value]) -> list[Value]:
        two = [load(code, code.add(start, code.mul(step, number(64))), kind) for start in starts]
        both = code.shuffle_vector(*two, ir.Constant(ir.VectorType(INT, 4 * LANES), order))
        store(code, both, code.add(out, code.mul(step, panel_bytes)), 64)
        return []

    repeat(code, panels, [], panel)


pack_16_keys = emitted(types.void(*[types.intp] * 4), _pack_16_keys)
pack_2_values = emitted(types.void(*[types.intp] * 5), _pack_2_values)
