"""The steps that attention over paged states is made of, for history rows and for candidates, softmax and pointwise.

Softmax is online: `top` is the largest logit so far in powers of two, `total` the sum of 2^(logit - top), `mixed` the
values summed with these weights. Pointwise (HSTU, arXiv 2402.17152) has weights silu(logit) / length and no total.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from rankd.engine.cuda.kernels.triton_pieces import MASKED, activated, config, narrowed, product, time_bucket


class Weighting(Enum):
    """What becomes of a logit: its share of a softmax (Climber), or silu(logit) / length (HSTU)."""

    SOFTMAX = "softmax"
    POINTWISE = "pointwise"


@dataclass(frozen=True, slots=True)
class AttentionTables:
    """What a logit is made of beside the product: (q k) x temperature + position + time.

    temperature (N, L, H), positions (N, L, H, X), times (N, L, H, 48), all float32; the last entry of `positions` is
    that of every distance beyond. For a softmax all three carry log2(e). Without a bias positions and times are None.
    `inverse_length` is 1 / length of pointwise weights.
    """

    temperature: Tensor
    positions: Tensor | None
    times: Tensor | None
    weighting: Weighting = Weighting.SOFTMAX
    inverse_length: float = 1.0

    @property
    def heads(self) -> int:
        """H."""
        return self.temperature.shape[2]

    @property
    def distances(self) -> int:
        """X: distances in tokens that are told apart."""
        return 1 if self.positions is None else self.positions.shape[3]


TILE_COLUMNS = 4
"""Of a tile: the user (-1: the tile is empty), its first row, how many of the user's rows come before it, its rows."""

CONFIGS = (config(4, 2, block_keys=16), *(config(w, s, block_keys=k) for k in (32, 64) for w in (4, 8) for s in (2, 3)))
"""The first is the interpreter's."""


def in_a_page(blocks: Mapping[str, Any], arguments: Mapping[str, Any]) -> bool:
    """A block of keys lies in one page."""
    return bool(blocks["block_keys"] <= arguments["PAGE"])


@triton.jit
def rows_at(pool, scales, rows, seen, columns, head, HEADS: tl.constexpr, HEAD: tl.constexpr, FP8: tl.constexpr):
    """The numbers (rows, room) of one head in rows of a page, zeros where not `seen`, and their scales (rows,)."""
    inside = seen[:, None] & (columns < HEAD)[None, :]
    numbers = tl.load(pool + rows[:, None] * (HEADS * HEAD) + (head * HEAD + columns)[None, :], mask=inside, other=0.0)
    scale = seen.to(tl.float32)
    if FP8:
        scale = tl.load(scales + rows * HEADS + head, mask=seen, other=0.0)
    return numbers, scale


@triton.jit
def relative_bias(positions, times, distance, seconds, DISTANCES: tl.constexpr):
    """The bias of distances in tokens and in seconds, both of one shape; `positions` and `times` are one head's."""
    place = tl.minimum(tl.maximum(distance, 0), DISTANCES - 1)
    return tl.load(positions + place) + tl.load(times + time_bucket(seconds))


@triton.jit
def weighed(
    top, total, mixed, logits, seen, values, scale, inverse_length, kind: tl.constexpr, POINTWISE: tl.constexpr
):
    """One block of keys more: next top (Q,), total (Q,) and mixed (Q, room) of logits (Q, keys), values (keys, room).

    `scale` (keys,) is that of the values, `kind` the type in which weights meet them.
    """
    if POINTWISE:
        weights = tl.where(seen, activated(logits, "silu") * inverse_length, 0.0)
    else:
        logits = tl.where(seen, logits, MASKED)
        higher = tl.maximum(top, tl.max(logits, 1))
        fade = tl.exp2(top - higher)
        weights = tl.where(seen, tl.exp2(logits - higher[:, None]), 0.0)
        total = total * fade + tl.sum(weights, 1)
        mixed = mixed * fade[:, None]
        top = higher
    mixed = product(narrowed(weights * scale[None, :], kind), values.to(kind), mixed)
    return top, total, mixed
