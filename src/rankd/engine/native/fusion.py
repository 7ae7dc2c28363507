"""After the blocks: models.climber.GatingFusion, the head and the direct network.

In: the blocks' outputs (C, N, D) float32 in the scratch memory. Out: logits (C, 32) float32, of which K are real.
Next: `native_calls.py`.
"""

from __future__ import annotations

import math

from rankd.engine.native import products, row_code
from rankd.engine.native.compiled import compiled
from rankd.engine.native.layer_steps import normalise_rows
from rankd.engine.native.layout import PAD, Scratch, Sizes, TopWeights

linear, silu, relu, add, gate = products.linear, products.silu, products.relu, products.add, products.gate
add_scaled_bf16, dot, narrow, zero = row_code.add_scaled_bf16, row_code.dot, row_code.narrow, row_code.zero
float_at, put_float = row_code.float_at, row_code.put_float


@compiled
def _attend(sz: Sizes, sc: Scratch, candidate: int) -> None:
    """Attention among one candidate's N tokens."""
    head_width, row, out_row = sz.width // sz.heads, 3 * sz.width * 2 + PAD, sz.width * 2 + PAD
    first = sc.qkv + candidate * sz.blocks * row
    for n in range(sz.blocks):
        zero(sc.mixed, sz.width // 16)
        for head in range(sz.heads):
            offset = head * head_width * 2
            largest = -math.inf
            for m in range(sz.blocks):
                key = first + m * row + sz.width * 2 + offset
                score = dot(first + n * row + offset, key, head_width // 2)
                put_float(sc.line + m * 4, score)
                largest = max(largest, score)
            whole = 0.0
            for m in range(sz.blocks):
                weight = math.exp(float_at(sc.line + m * 4) - largest)
                put_float(sc.line + m * 4, weight)
                whole += weight
            for m in range(sz.blocks):
                value, out = first + m * row + sz.width * 4 + offset, sc.mixed + offset * 2
                add_scaled_bf16(out, value, head_width // 16, float_at(sc.line + m * 4) / whole)
        narrow(sc.mixed, sz.width // 16, sc.attended + (candidate * sz.blocks + n) * out_row)


@compiled
def fuse(sz: Sizes, top: TopWeights, sc: Scratch, count: int) -> None:
    """sc.tokens (C, N D) after attention over the blocks and the gate, in place."""
    d, row, qkv_row = sz.width * 4, sz.width * 2 + PAD, 3 * sz.width * 2 + PAD
    pairs, panels, channels = sz.width // 2, sz.width // 32, sz.blocks * sz.width
    rows, wide, inner = count * sz.blocks, channels * 2 + PAD, sz.gate * 2 + PAD
    normalise_rows(sc.tokens, d, rows, sz.width, sc.normed, row)
    linear(sc.normed, row, rows, top.fusion_qkv, pairs, 3 * panels, sc.qkv, qkv_row, top.fusion_qkv_bias)
    for candidate in range(count):
        _attend(sz, sc, candidate)
    add(sc.attended, row, rows, top.fusion_out, pairs, panels, sc.tokens, d, top.fusion_out_bias)
    for candidate in range(count):
        narrow(sc.tokens + candidate * channels * 4, channels // 16, sc.wide + candidate * wide)
    relu(sc.wide, wide, count, top.gate_1, channels // 2, sz.gate // 32, sc.inner, inner, top.gate_1_bias)
    gate(sc.inner, inner, count, top.gate_2, sz.gate // 2, channels // 32, sc.tokens, channels * 4, top.gate_2_bias)


@compiled
def judge(sz: Sizes, top: TopWeights, sc: Scratch, count: int) -> None:
    """sc.logits (C, 32) = head(sc.tokens) + direct(sc.features)."""
    channels = sz.blocks * sz.width
    wide, inner, panels = channels * 2 + PAD, sz.hidden * 2 + PAD, sz.hidden // 32
    zero(sc.logits, count * 2)
    normalise_rows(sc.tokens, channels * 4, count, channels, sc.wide, wide)
    silu(sc.wide, wide, count, top.head_1, channels // 2, panels, sc.inner, inner, top.head_1_bias)
    add(sc.inner, inner, count, top.head_2, sz.hidden // 2, 1, sc.logits, 128, top.head_2_bias)
    if sz.direct:
        numeric = sz.numeric * 2
        silu(sc.features, numeric, count, top.direct_1, sz.numeric // 2, panels, sc.inner, inner, top.direct_1_bias)
        silu(sc.inner, inner, count, top.direct_2, sz.hidden // 2, panels, sc.wide, inner, top.direct_2_bias)
        add(sc.wide, inner, count, top.direct_3, sz.hidden // 2, 1, sc.logits, 128, top.direct_3_bias)
