"""What the history and the candidates share of a layer: packing keys and values, and all that follows attention.

In: addresses (`layout.py`). Out: panels for `tiles.py`, and the next tokens. Next: `history_attention.py`,
`candidate_attention.py`.

Keys and values are read by way of two lists of row addresses, so that a sequence may lie in two pieces (a known history
and what is new) and may end anywhere:

    3 known rows, 2 new ones -> known, known + s, known + 2 s, new, new + s, nothing, ... up to a multiple of 32
"""

from __future__ import annotations

from rankd.engine.native import apart, products, row_code
from rankd.engine.native.compiled import compiled
from rankd.engine.native.layout import FFN_ROWS, PAD, LayerWeights, Scratch, Sizes
from rankd.engine.native.vector_code import Code, Value, emitted, number, repeat, store, types

normalise = row_code.normalise
gelu, add = products.gelu, products.add
pack_16_keys, pack_2_values = apart.pack_16_keys, apart.pack_2_values


def _list_rows(code: Code, out: Value, first: Value, stride: Value, count: Value) -> None:
    def write(step: Value, _held: list[Value]) -> list[Value]:
        store(code, code.add(first, code.mul(step, stride)), code.add(out, code.mul(step, number(8))))
        return []

    repeat(code, count, [], write)


list_rows = emitted(types.void(*[types.intp] * 4), _list_rows)  # (out, first, stride, count): count >= 1


@compiled
def list_sequence(out: int, known: int, known_count: int, new: int, new_count: int, stride: int, nothing: int) -> None:
    """Write the row addresses of a sequence in two pieces, padded to a multiple of 32 with `nothing`."""
    if known_count > 0:
        list_rows(out, known, stride, known_count)
    if new_count > 0:
        list_rows(out + 8 * known_count, new, stride, new_count)
    count = known_count + new_count
    if count % 32 or count == 0:
        list_rows(out + 8 * count, nothing, 0, 32 - count % 32)


@compiled
def pack_head(sz: Sizes, sc: Scratch, head: int, count: int) -> None:
    """Pack one head of `count` listed keys and values into the scratch panels, in steps of 32 places."""
    pairs = sz.width // sz.heads // 2
    offset = head * pairs * 4
    for t in range(0, (count + 31) // 32 * 32, 16):
        panel = sc.keys + t // 32 * sz.head_room * 64 + t % 32 * 4
        pack_16_keys(sc.key_rows + 8 * t, offset, panel, pairs)
        for pair in range(t // 2, t // 2 + 8):
            there = sc.values + pair * 128
            pack_2_values(sc.value_rows + 16 * pair, offset, there, pairs, sc.columns * 64)


@compiled
def normalise_rows(x: int, stride: int, count: int, width: int, out: int, out_stride: int) -> None:
    """Centred and scaled rows in bfloat16; the norm's weight and bias are folded into the product that reads them."""
    for row in range(count):
        normalise(x + row * stride, width // 16, out + row * out_stride)


@compiled
def finish(sz: Sizes, w: LayerWeights, sc: Scratch, layer: int, x: int, stride: int, count: int) -> None:
    """x += out(attended), then x += ffn(x), in place; few enough rows at a time for the second-level cache."""
    pairs, panels, row = sz.width // 2, sz.width // 32, sz.width * 2 + PAD
    hidden = sz.ffn * 2 + PAD
    square, tall = layer * sz.width * sz.width * 2, layer * sz.width * sz.ffn * 2
    bias, wide_bias = layer * sz.width * 4, layer * sz.ffn * 4
    for first in range(0, count, FFN_ROWS):
        rows, here = min(FFN_ROWS, count - first), x + first * stride
        add(sc.attended + first * row, row, rows, w.out + square, pairs, panels, here, stride, w.out_bias + bias)
        normalise_rows(here, stride, rows, sz.width, sc.normed, row)
        gelu(sc.normed, row, rows, w.up + tall, pairs, sz.ffn // 32, sc.hidden, hidden, w.up_bias + wide_bias)
        add(sc.hidden, hidden, rows, w.down + tall, sz.ffn // 2, panels, here, stride, w.down_bias + bias)
