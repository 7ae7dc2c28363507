"""The work of one request, counted from a model's sizes; layers may all be different.

In: an `Anatomy`, T history tokens, C candidates. Out: `Work`, by kinds, so that `layer_prices.py` can give each kind
a price. `bench.flops` counts the same for even models, and a test holds the two together.
"""

from __future__ import annotations

from typing import NamedTuple, Self

from rankd.compress.anatomy import Anatomy
from rankd.models.layer_shapes import FusionShape, LayerShape


class Work(NamedTuple):
    """Floating-point operations by what they are done for, and how many layers were passed."""

    layers: float = 0.0
    projections: float = 0.0
    pairs: float = 0.0
    ffn: float = 0.0
    top: float = 0.0

    def plus(self, other: Self) -> Work:
        """Both together."""
        return Work(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    @property
    def flops(self) -> float:
        """Everything but the count of layers."""
        return self.projections + self.pairs + self.ffn + self.top


def encode_work(model: Anatomy, tokens: int) -> Work:
    """Encoding T tokens in each block. Of a Climber's last layer keys and values alone are computed."""
    total, causal = Work(), tokens * (tokens + 1) / 2
    for stack in model.blocks:
        passed = [layer for layer in stack for _ in range(model.repeats)]
        for layer in passed if model.fusion is None else passed[:-1]:
            total = total.plus(_layer(model.width, layer, tokens, causal))
        if model.fusion is not None:
            only = passed[-1]
            parts = _product(model.width, 2 * only.attention_width, only.qkv_rank)
            total = total.plus(Work(layers=1, projections=tokens * parts))
    return total


def score_work(model: Anatomy, tokens: int, candidates: int) -> Work:
    """Scoring C candidates against the state of T tokens in each block."""
    if model.fusion is None:
        user, each = 2 * model.width**2 * model.num_tasks, 4 * model.width * model.num_tasks
        return Work(top=user + candidates * each)
    total = Work(top=candidates * _top(model, model.fusion))
    for stack in model.blocks:
        for layer in stack:
            one = _layer(model.width, layer, candidates, candidates * (tokens + 1))
            total = total.plus(Work(*(model.repeats * amount for amount in one)))
    return total


def _layer(width: int, layer: LayerShape, rows: int, pairs: float) -> Work:
    attention = layer.attention_width
    return Work(
        layers=1,
        projections=rows
        * (_product(width, 3 * attention, layer.qkv_rank) + _product(attention, width, layer.out_rank)),
        pairs=4 * attention * pairs,
        ffn=rows * (_product(width, layer.ffn, layer.up_rank) + _product(layer.ffn, width, layer.down_rank)),
    )


def _product(inputs: int, outputs: int, rank: int) -> float:
    """One row through a projection."""
    return 2.0 * (rank * (inputs + outputs) if rank else inputs * outputs)


def _top(model: Anatomy, fusion: FusionShape) -> float:
    """Fusion and head of one candidate."""
    blocks, attention = len(model.blocks), fusion.heads * fusion.head_width
    channels = blocks * model.width
    fused = blocks * (8.0 * model.width * attention + 4.0 * blocks * attention)
    return fused + 4.0 * channels * fusion.gate + 2.0 * (channels + model.num_tasks) * model.hidden
