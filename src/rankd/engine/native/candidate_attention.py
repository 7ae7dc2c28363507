"""The candidates' layers: each sees the user's history and itself, never another candidate.

In: candidates' tokens, keys and values of the history. Out: the tokens after all layers of a block, in place.
Next: `native_calls.py`.
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
candidate_softmax, bias_row = apart.candidate_softmax, row_code.bias_row


def _attend(height: int, raw: Any, own: Any) -> Callable[[Sizes, LayerWeights, Scratch, int, int, int, int], None]:
    def attend(sz: Sizes, w: LayerWeights, sc: Scratch, layer: int, head: int, first: int, count: int) -> None:
        head_width = sz.width // sz.heads
        offset, row = head * head_width * 2, 3 * sz.width * 2 + PAD
        vectors = (count + 15) // 16
        score_row, power_row = sc.columns * 4 + PAD, sc.columns * 2 + PAD
        queries = sc.qkv + first * row + offset
        for panel in range((vectors + 1) // 2):
            keys = sc.keys + panel * sz.head_room * 64
            raw(queries, row, keys, head_width // 2, sc.scores + panel * 128, score_row, 0)
        itself = w.itself + (layer * sz.heads + head) * 4
        for r in range(height):
            query = queries + r * row
            candidate_softmax(
                sc.scores + r * score_row, sc.powers + r * power_row, vectors, sc.bias, query, query + sz.width * 2,
                head_width // 2, itself, sc.factors + r * 4,
            )  # fmt: skip
        out, out_row = sc.attended + first * (sz.width * 2 + PAD) + offset, sz.width * 2 + PAD
        for panel in range(sz.head_room // 32):
            values, mine = sc.values + panel * sc.columns * 64, queries + sz.width * 4 + panel * 64
            own(sc.powers, power_row, values, vectors * 8, out + panel * 64, out_row, sc.factors, mine, row)

    return compiled(attend)


attend_12, attend_4, attend_1 = (
    _attend(height, raw, own) for height, raw, own in zip(HEIGHTS, apart.RAW, apart.OWN, strict=True)
)


@compiled
def attend_candidates(sz: Sizes, w: LayerWeights, sc: Scratch, layer: int, rows: int, count: int) -> None:
    """attended = attention of `rows` candidates over `count` listed keys and values and over themselves.

    A head narrower than its room writes beyond its columns; the next one, or the padding of the row, takes that.
    """
    seen = max(count, 1)  # of an empty history, one key far below
    for head in range(sz.heads):
        pack_head(sz, sc, head, seen)
        which = layer * sz.heads + head
        positions = w.positions + (which * sz.distances + sz.distances - 17 - count) * 4
        bias_row(sc.bias, positions, sc.buckets, w.times + which * TIME_BUCKETS * 4, (seen + 15) // 16, count)
        row = 0
        while row + 12 <= rows:
            attend_12(sz, w, sc, layer, head, row, seen)
            row += 12
        while row + 4 <= rows:
            attend_4(sz, w, sc, layer, head, row, seen)
            row += 4
        while row < rows:
            attend_1(sz, w, sc, layer, head, row, seen)
            row += 1


@compiled
def candidate_block(
    sz: Sizes, w: LayerWeights, sc: Scratch, block: int, x: int, stride: int, rows: int,
    known: int, known_rows: int, count: int,
) -> None:  # fmt: skip
    """x (C, D) float32 after the layers of a block; known (L, 2, known_rows, D), `count` rows of it real.

    sc.buckets (T,) of the time from each key to now must be there.
    """
    row, d = sz.width * 2 + PAD, sz.width * 2
    square = sz.width * d
    for depth in range(sz.layers):
        layer = block * sz.layers + depth
        weights, bias = w.qkv + layer * 3 * square, w.qkv_bias + layer * 3 * sz.width * 4
        normalise_rows(x, stride, rows, sz.width, sc.normed, row)
        linear(sc.normed, row, rows, weights, sz.width // 2, 3 * sz.width // 32, sc.qkv, 3 * d + PAD, bias)
        keys = known + depth * 2 * known_rows * d
        list_sequence(sc.key_rows, keys, count, 0, 0, d, sc.nothing)
        list_sequence(sc.value_rows, keys + known_rows * d, count, 0, 0, d, sc.nothing)
        attend_candidates(sz, w, sc, layer, rows, count)
        finish(sz, w, sc, layer, x, stride, rows)
