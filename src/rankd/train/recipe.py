"""The recipe of a training run: which model, which sizes, how it is trained. A TOML file; `trainer.py` follows it."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from rankd.train.samples import Shapes


class ModelChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model by its name (see `models.protocol.create_model`) and the options of its constructor."""

    kind: str
    options: dict[str, Any] = {}


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the weights are found. A request of training is one basket: its items and `negatives` sampled others.

    The loss is binary cross-entropy of every task plus `listwise` times a softmax over the request's candidates.
    `averaging` is the decay a step of the averaged weights, which are the ones that are validated and kept.
    `by_length` puts requests with about as long histories into a batch and cuts it to the smallest history bucket that
    holds them: the same model sees the same requests in less time.
    With `precision` "bf16" matrix products of training run in bfloat16 (torch's autocast) and the rest, weights and
    losses among it, stays in float32; validation is in float32. It pays where the processor multiplies in bfloat16.
    Training stops after `patience` epochs without a better validation score (NDCG@10 + GAUC), or after `epochs`.
    """

    epochs: int = 20
    patience: int = 4
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.02
    negatives: int = 100
    max_positives: int = 48
    listwise: float = 1.0
    averaging: float = 0.98
    by_length: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 7


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    model: ModelChoice
    shapes: Shapes
    training: Training = Training()
