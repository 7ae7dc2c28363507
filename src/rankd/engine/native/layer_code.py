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
    load_first,
    number,
    repeat,
    store,
    types,
    vectors_of,
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


def _pack_16_keys(code: Code, rows: Value, offset: Value, out: Value, pairs: Value) -> None:
    """16 keys of `pairs` pairs into half a panel: pair p of key t goes to out + 128 p + 4 t.

    Zeros fill up the last 16 pairs, for which there must be room.
    """
    starts = [code.add(load(code, code.add(rows, number(8 * row)), INT64), offset) for row in range(LANES)]

    def block(step: Value, _held: list[Value]) -> list[Value]:
        there = code.add(out, code.mul(step, number(LANES * 128)))
        left = code.sub(pairs, code.mul(step, number(LANES)))
        keys = [load_first(code, code.add(start, code.mul(step, number(64))), left) for start in starts]
        for pair, column in enumerate(_transpose(code, keys)):
            store(code, column, code.add(there, number(128 * pair)), 64)
        return []

    repeat(code, vectors_of(code, pairs), [], block)


def _pack_2_values(code: Code, rows: Value, offset: Value, out: Value, pairs: Value, panel_bytes: Value) -> None:
    """Two neighbouring rows of 2 `pairs` values, interleaved, into their place of each panel of 32 columns.

    Zeros fill up the last one.
    """
    kind = ir.VectorType(ir.IntType(16), 2 * LANES)
    order = [lane // 2 + 2 * LANES * (lane % 2) for lane in range(4 * LANES)]
    starts = [code.add(load(code, code.add(rows, number(8 * row)), INT64), offset) for row in range(2)]

    def panel(step: Value, _held: list[Value]) -> list[Value]:
        left = code.sub(pairs, code.mul(step, number(LANES)))
        there = (load_first(code, code.add(start, code.mul(step, number(64))), left) for start in starts)
        two = [code.bitcast(row, kind) for row in there]
        both = code.shuffle_vector(*two, ir.Constant(ir.VectorType(INT, 4 * LANES), order))
        store(code, both, code.add(out, code.mul(step, panel_bytes)), 64)
        return []

    repeat(code, vectors_of(code, pairs), [], panel)


pack_16_keys = emitted(types.void(*[types.intp] * 4), _pack_16_keys)
pack_2_values = emitted(types.void(*[types.intp] * 5), _pack_2_values)
