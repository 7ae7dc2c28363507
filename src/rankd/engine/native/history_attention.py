"""The history's layers: every token sees what came before it, tile by tile, nothing above the diagonal.

In: addresses of the normed tokens' rows and of what is known of the history. Out: keys and values of the new tokens,
bfloat16. An encoding is an extension of nothing. Next: `native_calls.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rankd.engine.native import apart, products, row_code
from rankd.engine.native.compiled import compiled
from rankd.engine.native.layer_steps import finish, list_sequence, normalise_rows, pack_head
from rankd.engine.native.layout import PAD, LayerWeights, Scratch, Sizes
from rankd.engine.native.row_code import TIME_BUCKETS
from rankd.engine.native.tiles import HEIGHTS

linear = products.linear
history_softmax, buckets = apart.history_softmax, row_code.buckets


def _attend(height: int, raw: Any, scale: Any) -> Callable[[Sizes, LayerWeights, Scratch, int, int, int, int], None]:
    def attend(sz: Sizes, w: LayerWeights, sc: Scratch, layer: int, head: int, first: int, start: int) -> None:
        head_width = sz.width // sz.heads
        offset, row = head * head_width * 2, sz.width * 2 + PAD
        vectors = (start + first + height + 15) // 16
        score_row, power_row = sc.columns * 4 + PAD, sc.columns * 2 + PAD
        queries = sc.qkv + first * row + offset
        for panel in range((vectors + 1) // 2):
            keys = sc.keys + panel * sz.head_room * 64
            raw(queries, row, keys, head_width // 2, sc.scores + panel * 128, score_row, 0)
        which = layer * sz.heads + head
        positions = w.positions + (which * sz.distances + sz.distances - 16) * 4
        times = w.times + which * TIME_BUCKETS * 4
        for r in range(height):
            count = start + first + r + 1
            history_softmax(
                sc.scores + r * score_row, sc.powers + r * power_row, vectors, positions - count * 4,
                sc.buckets + (first + r) * sc.columns, times, count, sc.factors + r * 4,
            )  # fmt: skip
        out = sc.attended + first * row + offset
        for panel in range(sz.head_room // 32):
            values = sc.values + panel * sc.columns * 64
            scale(sc.powers, power_row, values, vectors * 8, out + panel * 64, row, sc.factors)

    return compiled(attend)


attend_12, attend_4, attend_1 = (
    _attend(height, raw, scale) for height, raw, scale in zip(HEIGHTS, apart.RAW, apart.SCALE, strict=True)
)


@compiled
def attend_history(sz: Sizes, w: LayerWeights, sc: Scratch, layer: int, start: int, count: int) -> None:
    """attended = attention of `count` queries at places start.. over the keys and values that are listed.

    Heads come in their order: see `attend_candidates`.
    """
    for head in range(sz.heads):
        pack_head(sz, sc, head, start + count)
        row = 0
        while row + 12 <= count:
            attend_12(sz, w, sc, layer, head, row, start)
            row += 12
        while row + 4 <= count:
            attend_4(sz, w, sc, layer, head, row, start)
            row += 4
        while row < count:
            attend_1(sz, w, sc, layer, head, row, start)
            row += 1


@compiled
def history_block(
    sz: Sizes, w: LayerWeights, sc: Scratch, block: int, x: int, stride: int, count: int,
    made: int, made_rows: int, known: int, known_rows: int, start: int,
) -> None:  # fmt: skip
    """Keys and values of `count` tokens x, float32, of one block, to `made` (L, 2, made_rows, D).

    `known` (L, 2, known_rows, D) is what they follow, `start` rows of it; sc.buckets (count, T) must be there.
    """
    pairs, panels, row, d = sz.width // 2, sz.width // 32, sz.width * 2 + PAD, sz.width * 2
    square = sz.width * d
    for depth in range(sz.layers):
        layer = block * sz.layers + depth
        weights, bias = w.qkv + layer * 3 * square, w.qkv_bias + layer * 3 * sz.width * 4
        keys = made + depth * 2 * made_rows * d
        values = keys + made_rows * d
        normalise_rows(x, stride, count, sz.width, sc.normed, row)
        linear(sc.normed, row, count, weights + square, pairs, panels, keys, d, bias + sz.width * 4)
        linear(sc.normed, row, count, weights + 2 * square, pairs, panels, values, d, bias + sz.width * 8)
        if depth < sz.layers - 1:
            linear(sc.normed, row, count, weights, pairs, panels, sc.qkv, row, bias)
            old = known + depth * 2 * known_rows * d
            list_sequence(sc.key_rows, old, start, keys, count, d, sc.nothing)
            list_sequence(sc.value_rows, old + known_rows * d, start, values, count, d, sc.nothing)
            attend_history(sz, w, sc, layer, start, count)
            finish(sz, w, sc, layer, x, stride, count)
