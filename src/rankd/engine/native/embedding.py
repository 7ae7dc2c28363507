"""Events and candidates as vectors, the sums of rows of tables: models.tokens.TokenEmbedding without torch.

In: addresses of a request's arrays. Out: float32 rows at an address. Next: `native_calls.py`.
"""

from __future__ import annotations

from rankd.engine.native import products, row_code
from rankd.engine.native.compiled import compiled
from rankd.engine.native.layout import PAD, Candidates, Events, Scratch, Sizes, TopWeights

set_row, add_scaled, norm_affine = row_code.set_row, row_code.add_scaled, row_code.norm_affine
narrow, zero, int_at, float_at, put_float = (
    row_code.narrow, row_code.zero, row_code.int_at, row_code.float_at, row_code.put_float,
)  # fmt: skip
silu, add = products.silu, products.add


@compiled
def _looked_up(table: int, rows: int, width: int, index: int) -> int:
    """The address of a row of a float32 table."""
    row = int_at(index)
    return table + (row if 0 <= row < rows else 0) * width * 4


@compiled
def embed_events(sz: Sizes, top: TopWeights, ev: Events, block: int, count: int, out: int) -> None:
    """The first `count` tokens of a block to `out` (T, D) float32, normed."""
    vectors, d = sz.width // 16, sz.width * 4
    for t in range(count):
        row, place = out + t * d, block * ev.length + t
        set_row(row, _looked_up(top.item, sz.item_rows, sz.width, ev.item + place * 4), vectors)
        add_scaled(row, _looked_up(top.event, sz.event_rows, sz.width, ev.event + place * 4), vectors, 1.0)
        for g in range(ev.num_categories):
            code = ev.categories + (place * ev.num_categories + g) * 4
            add_scaled(row, _looked_up(top.categories, sz.category_rows, sz.width, code), vectors, 1.0)
        for e in range(ev.num_values):
            add_scaled(row, top.values + e * d, vectors, float_at(ev.values + (place * ev.num_values + e) * 4))
        norm_affine(row, vectors, top.history_norm, top.history_norm + d)


@compiled
def _embed_user(sz: Sizes, top: TopWeights, sc: Scratch, ca: Candidates) -> None:
    """sc.user (D,): the sum of what is known of the user."""
    vectors, d = sz.width // 16, sz.width * 4
    zero(sc.user, vectors)
    for g in range(ca.num_user_categories):
        row = _looked_up(top.user_categories, sz.user_category_rows, sz.width, ca.user_categories + g * 4)
        add_scaled(sc.user, row, vectors, 1.0)
    for f in range(ca.num_user_numeric):
        add_scaled(sc.user, top.user_numeric + f * d, vectors, float_at(ca.user_numeric + f * 4))


@compiled
def _narrow_features(sz: Sizes, sc: Scratch, ca: Candidates) -> None:
    """sc.features (C, numeric) bfloat16 of numeric (C, F) float32, the rest of each row 0."""
    zero(sc.line, sz.numeric // 16)
    for c in range(ca.rows):
        for f in range(ca.num_numeric):
            put_float(sc.line + f * 4, float_at(ca.numeric + (c * ca.num_numeric + f) * 4))
        narrow(sc.line, sz.numeric // 16, sc.features + c * sz.numeric * 2)


@compiled
def embed_candidates(sz: Sizes, top: TopWeights, sc: Scratch, ca: Candidates) -> None:
    """The candidates to sc.tokens (C, N, D) float32, normed, alike for all N; their features to sc.features."""
    vectors, d, stride = sz.width // 16, sz.width * 4, sz.blocks * sz.width * 4
    _embed_user(sz, top, sc, ca)
    for c in range(ca.rows):
        row = sc.tokens + c * stride
        set_row(row, _looked_up(top.item, sz.item_rows, sz.width, ca.item + c * 4), vectors)
        add_scaled(row, sc.user, vectors, 1.0)
        for g in range(ca.num_categories):
            code = ca.categories + (c * ca.num_categories + g) * 4
            add_scaled(row, _looked_up(top.categories, sz.category_rows, sz.width, code), vectors, 1.0)
    if sz.numeric > 0:
        _narrow_features(sz, sc, ca)
        pairs, panels, width, inner = sz.numeric // 2, sz.width // 32, sz.numeric * 2, sz.width * 2 + PAD
        silu(sc.features, width, ca.rows, top.numeric_1, pairs, panels, sc.inner, inner, top.numeric_1_bias)
        add(sc.inner, inner, ca.rows, top.numeric_2, sz.width // 2, panels, sc.tokens, stride, top.numeric_2_bias)
    for c in range(ca.rows):
        row = sc.tokens + c * stride
        norm_affine(row, vectors, top.candidate_norm, top.candidate_norm + d)
        for n in range(1, sz.blocks):
            set_row(row + n * d, row, vectors)
