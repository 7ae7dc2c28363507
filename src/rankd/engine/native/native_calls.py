"""The two calls that the interpreter makes: extend a history (from nothing: encode it), and score candidates.

In: addresses of arrays as assembly packs them, for one user. Out: bfloat16 keys and values, or logits in the scratch
memory. All arguments are tuples of integers, so there is one machine code whatever the arrays are (read-only, a view),
compiled with all it needs and kept on disk. Next: `native_climber.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rankd.engine.native import row_code
from rankd.engine.native.candidate_attention import candidate_block
from rankd.engine.native.compiled import SOURCE, compiled, kept
from rankd.engine.native.embedding import embed_candidates, embed_events
from rankd.engine.native.fusion import fuse, judge
from rankd.engine.native.history_attention import history_block
from rankd.engine.native.layout import Candidates, Events, Known, LayerWeights, Scratch, Sizes, TopWeights

buckets, int_at, put_int, zero = row_code.buckets, row_code.int_at, row_code.put_int, row_code.zero

Extend = Callable[[Sizes, TopWeights, LayerWeights, Scratch, Events, Known, int], int]
Score = Callable[[Sizes, TopWeights, LayerWeights, Scratch, Known, Candidates], int]


@compiled
def _copy_times(out: int, times: int, count: int) -> None:
    for t in range(count):
        put_int(out + t * 4, int_at(times + t * 4))


@compiled
def _clear_rows(sz: Sizes, made: int, count: int, length: int) -> None:
    """Zero the rows of made (L, 2, length, D) bfloat16 from `count` on."""
    if count < length:
        for which in range(2 * sz.layers):
            zero(made + (which * length + count) * sz.width * 2, (length - count) * sz.width // 32)


def _versions(source: int) -> tuple[Any, Any]:
    def extend(sz: Sizes, top: TopWeights, w: LayerWeights, sc: Scratch, ev: Events, known: Known, made: int) -> int:
        for n in range(ev.first, ev.last):
            count, start = int_at(ev.counts + n * 4), int_at(known.counts + n * 4)
            block = sz.layers * 2 * sz.width * 2
            mine = made + n * block * ev.length
            _clear_rows(sz, mine, count, ev.length)
            _copy_times(sc.times, known.times + n * known.length * 4, start)
            _copy_times(sc.times + start * 4, ev.times + n * ev.length * 4, count)
            for t in range(count):
                now = int_at(sc.times + (start + t) * 4)
                buckets(now, sc.times, (start + t) // 16 + 1, sc.buckets + t * sc.columns)
            embed_events(sz, top, ev, n, count, sc.tokens)
            old = known.keys_values + n * block * known.length
            if count > 0:
                history_block(
                    sz, w, sc, n, sc.tokens, sz.width * 4, count, mine, ev.length, old, known.length, start
                )  # fmt: skip
        return source

    def score(sz: Sizes, top: TopWeights, w: LayerWeights, sc: Scratch, known: Known, ca: Candidates) -> int:
        embed_candidates(sz, top, sc, ca)
        for n in range(sz.blocks):
            seen = int_at(known.counts + n * 4)
            _copy_times(sc.times, known.times + n * known.length * 4, seen)
            buckets(ca.now, sc.times, seen // 16 + 1, sc.buckets)
            x, stride = sc.tokens + n * sz.width * 4, sz.blocks * sz.width * 4
            old = known.keys_values + n * sz.layers * 2 * known.length * sz.width * 2
            candidate_block(sz, w, sc, n, x, stride, ca.rows, old, known.length, seen)
        fuse(sz, top, sc, ca.rows)
        judge(sz, top, sc, ca.rows)
        return source

    return kept(extend), kept(score)


extend_history: Extend
score_candidates: Score
extend_history, score_candidates = _versions(SOURCE)
