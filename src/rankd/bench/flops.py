"""Floating-point operations of a Climber, computed from its sizes.

In: the sizes of a model, T history tokens a block, C candidates. Out: `Flops` of one request. `workload.py` reads the
sizes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Self

import msgspec


class ModelSizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A Climber's sizes: N blocks of L layers, width D, H heads, feed-forward of ffn_ratio x D, and a head.

    The head is N x D -> hidden -> K. D is a multiple of H.
    """

    blocks: int
    layers: int
    width: int
    heads: int = 4
    ffn_ratio: int = 4
    hidden: int = 128
    tasks: int = 1


class Flops(msgspec.Struct, frozen=True):
    """One request: every token sees every token (`dense`); only what the mask lets through (`useful`); of that, only
    what the scores depend on (`needed`); what is left once the user's state is there (`candidates`)."""

    dense: float
    useful: float
    needed: float
    candidates: float

    def __add__(self, other: Self) -> Flops:
        return Flops(*(mine + theirs for mine, theirs in zip(self.amounts(), other.amounts(), strict=True)))

    def scaled(self, factor: float) -> Flops:
        """Each of them times a factor."""
        return Flops(*(amount * factor for amount in self.amounts()))

    def amounts(self) -> tuple[float, ...]:
        """In the order of the fields."""
        return self.dense, self.useful, self.needed, self.candidates


def climber_flops(sizes: ModelSizes, tokens: float, candidates: float) -> Flops:
    """One request of T = `tokens` history tokens in each block and C = `candidates`.

    A product of (m, k) by (k, n) counts 2mkn; norms, softmax, biases, look-ups and the small projections of numeric
    features count nothing. With r = ffn_ratio:

        a layer, each token            2 (4 + 2r) D^2          queries, keys, values, out: 4 D^2; feed-forward: 2r D^2
        a layer, each pair q, k        4 D                     q k^T and the weighted sum of values
        pairs, dense                   (T + C)^2
        pairs, useful                  T (T + 1) / 2 + C (T + 1)    causal history; a candidate sees it and itself
        fusion, each candidate         N (8 D^2 + 4 N D) + (N D)^2   attention over N blocks; gate N D -> N D / 4 -> N D
        head, each candidate           2 (N D hidden + hidden K)

    `useful` counts all layers of the history in full. Nobody reads the last layer's history outputs, though: `needed`
    counts keys and values alone there, 2 x 2 D^2 a token.
    """
    one = stack_flops(sizes, tokens, candidates).scaled(sizes.blocks)
    top = candidates * (_fusion_flops(sizes) + head_flops(sizes.blocks * sizes.width, sizes.hidden, sizes.tasks))
    return one + Flops(top, top, top, top)


def stack_flops(sizes: ModelSizes, tokens: float, candidates: float) -> Flops:
    """One block's layers alone; see `climber_flops`."""
    a_token = 2 * (4 + 2 * sizes.ffn_ratio) * sizes.width**2
    a_pair = 4 * sizes.width
    seen = candidates * (tokens + 1)
    causal = tokens * (tokens + 1) / 2
    everybody = (tokens + candidates) * a_token
    unread = tokens * (a_token - 4 * sizes.width**2) + causal * a_pair
    useful = sizes.layers * (everybody + (causal + seen) * a_pair)
    return Flops(
        dense=sizes.layers * (everybody + (tokens + candidates) ** 2 * a_pair),
        useful=useful,
        needed=useful - unread,
        candidates=sizes.layers * (candidates * a_token + seen * a_pair),
    )


def head_flops(*widths: int) -> float:
    """A chain of dense layers of the given widths, one row."""
    return sum(2.0 * a * b for a, b in pairwise(widths))


def _fusion_flops(sizes: ModelSizes) -> float:
    blocks, width = sizes.blocks, sizes.width
    attention = blocks * (8.0 * width**2 + 4.0 * blocks * width)
    return attention + (blocks * width) ** 2  # the gate: N D -> N D / 4 -> N D
