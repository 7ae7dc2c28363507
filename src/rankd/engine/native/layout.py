"""Where everything lies: sizes, addresses of the packed weights and of the scratch memory, as numba reads them.

Tuples of integers; `weight_panels.py`, `scratch.py` and `native_climber.py` make them. Strides are in bytes; bfloat16
rows of scratch are padded by 64 bytes: equal columns of neighbouring rows then fall into different cache sets.
"""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """N blocks of L layers, D width, H heads, the other layers' widths, and rows of tables."""

    blocks: int
    layers: int
    width: int
    heads: int
    head_room: int  # D / H rounded up to 32: what a head takes where it is packed by itself
    ffn: int
    gate: int
    hidden: int
    tasks: int
    distances: int  # columns of the position table of one head, see `weight_panels.distance_table`
    numeric: int  # numeric features of a candidate, rounded up to 16
    direct: int  # 1 if there is a direct network
    item_rows: int  # of the embedding tables; whatever lies outside reads row 0
    category_rows: int
    event_rows: int
    user_category_rows: int


class LayerWeights(NamedTuple):
    """Addresses of the layers' weights: layer l of block n is at address + (n L + l) x the size of one layer's."""

    qkv: int  # panels (3 D / 32, D / 2, 64) bfloat16
    qkv_bias: int
    out: int
    out_bias: int
    up: int
    up_bias: int
    down: int
    down_bias: int
    positions: int  # (H, distances) float32
    times: int  # (H, 48) float32
    itself: int  # (H,) float32


class TopWeights(NamedTuple):
    """Addresses of what is not in a layer."""

    item: int
    categories: int
    event: int
    values: int  # (E, D) float32
    user_categories: int
    user_numeric: int  # (F, D) float32
    numeric_1: int
    numeric_1_bias: int
    numeric_2: int
    numeric_2_bias: int
    history_norm: int  # weight and then bias, (2, D) float32
    candidate_norm: int
    fusion_qkv: int
    fusion_qkv_bias: int
    fusion_out: int
    fusion_out_bias: int
    gate_1: int
    gate_1_bias: int
    gate_2: int
    gate_2_bias: int
    head_1: int
    head_1_bias: int
    head_2: int
    head_2_bias: int
    direct_1: int
    direct_1_bias: int
    direct_2: int
    direct_2_bias: int
    direct_3: int
    direct_3_bias: int


class Scratch(NamedTuple):
    """Addresses of memory that holds nothing between calls."""

    tokens: int  # (rows, N D) float32: the residual stream
    normed: int  # (rows, D + 32) bfloat16
    qkv: int  # (rows, 3 D + 32) bfloat16
    attended: int  # (rows, D + 32) bfloat16
    hidden: int  # (FFN_ROWS, ffn + 32) bfloat16
    wide: int  # (C, max(N D, hidden) + 32) bfloat16
    inner: int  # (C, max(D, gate, hidden) + 32) bfloat16
    keys: int  # packed panels of one head of room d, (T / 32, d / 2, 64) bfloat16
    values: int  # (d / 32, T / 2, 64) bfloat16
    scores: int  # (12, T + 16) float32
    powers: int  # (12, T + 32) bfloat16
    factors: int  # (2, 16) float32
    bias: int  # (T,) float32
    buckets: int  # (R, T) uint8
    user: int  # (D,) float32
    mixed: int  # (D,) float32
    key_rows: int  # (T,) int64: the address of each key's row, and of each value's
    value_rows: int
    nothing: int  # (D,) bfloat16 zeros: the row of a key behind the last
    times: int  # (T,) int32: a sequence's, known and new
    features: int  # (C, numeric) bfloat16
    line: int  # (max(numeric, N),) float32
    logits: int  # (C, 32) float32: the result
    columns: int  # T of the scratch, a multiple of 32: the stride of scores, powers and buckets comes from it


class Events(NamedTuple):
    """Addresses of N sequences of events as `features.schema.history_specs` describes them, `length` places each."""

    item: int
    event: int
    times: int
    counts: int
    categories: int
    num_categories: int
    values: int
    num_values: int
    length: int
    first: int  # the blocks first..last - 1 are worked on
    last: int


class Known(NamedTuple):
    """Addresses of a state: keys_values (N, L, 2, length, D) bfloat16, times (N, length) int32, counts (N,) int32."""

    keys_values: int
    times: int
    counts: int
    length: int


class Candidates(NamedTuple):
    """Addresses of `rows` candidates as `features.schema.candidate_specs` describes them, and the moment."""

    item: int
    categories: int
    num_categories: int
    numeric: int
    num_numeric: int
    user_categories: int
    num_user_categories: int
    user_numeric: int
    num_user_numeric: int
    now: int
    rows: int


FFN_ROWS = 132
PAD = 64  # bytes
