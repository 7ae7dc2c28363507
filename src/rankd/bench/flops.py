"""Floating-point operations of a Climber or an HSTU, computed from its sizes.

In: the sizes of a model, T history tokens a block, C candidates. Out: `Flops` of one request. `workload.py` reads the
sizes.
"""

from __future__ import annotations

from enum import Enum
from itertools import pairwise
from typing import Any, Self

import msgspec

from rankd.models.layer_shapes import HstuForm


class ModelKind(Enum):
    """Which of the rankers that are made of blocks; by its name in `models.protocol`."""

    CLIMBER = "climber"
    HSTU = "hstu"


class ModelSizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ranker's sizes: N blocks of L layers, width D, H heads, and a head N x D -> hidden -> K. D is a multiple of H.

    A Climber has a feed-forward of ffn_ratio x D in each layer and an HSTU has none; `form` is of an HSTU alone.
    """

    blocks: int
    layers: int
    width: int
    heads: int = 4
    ffn_ratio: int = 4
    hidden: int = 128
    tasks: int = 1
    kind: ModelKind = ModelKind.CLIMBER
    form: HstuForm = HstuForm.PAPER

    def options(self) -> dict[str, Any]:
        """What the model's constructor takes of them."""
        wanted = OPTIONS[self.kind]
        return {name: size for name, size in msgspec.to_builtins(self).items() if name in wanted}


OPTIONS: dict[ModelKind, dict[str, Any]] = {
    ModelKind.CLIMBER: {"width": 64, "heads": 4, "layers": 2, "ffn_ratio": 4, "hidden": 128},
    ModelKind.HSTU: {"width": 64, "heads": 4, "layers": 4, "hidden": 128, "form": "paper"},
}
"""The options of `models.climber.Climber` and `models.hstu.Hstu` that are sizes, with their defaults; here because
serving does not import torch."""


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


def model_flops(sizes: ModelSizes, tokens: float, candidates: float) -> Flops:
    """One request of T = `tokens` history tokens in each block and C = `candidates`, whichever the model is."""
    return (
        climber_flops(sizes, tokens, candidates)
        if sizes.kind is ModelKind.CLIMBER
        else hstu_flops(sizes, tokens, candidates)
    )


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


def hstu_flops(sizes: ModelSizes, tokens: float, candidates: float) -> Flops:
    """One request, counted as `climber_flops` counts. With r = 1 in the paper's form and 3 in that of dlrm-v3:

    a layer, each token            2 (4 + r) D^2           U, queries, keys, values: 4 D^2; out: r D^2
    a layer, each pair q, k        4 D                     as a Climber's, and as many pairs
    head, each candidate           2 (N D hidden + hidden K)
    """
    one = stack_flops(sizes, tokens, candidates).scaled(sizes.blocks)
    top = candidates * head_flops(sizes.blocks * sizes.width, sizes.hidden, sizes.tasks)
    return one + Flops(top, top, top, top)


def stack_flops(sizes: ModelSizes, tokens: float, candidates: float) -> Flops:
    """One block's layers alone; see `climber_flops` and `hstu_flops`."""
    widths = 4 + (2 * sizes.ffn_ratio if sizes.kind is ModelKind.CLIMBER else sizes.form.output_parts)
    a_token = 2 * widths * sizes.width**2
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
