"""What is kept of a compression: which recipe, how much is left, and how the accuracy gate decided.

`rankd compress` writes it into a run folder, `rankd build` into model.toml, `rankd serve` shows it.
"""

from __future__ import annotations

from typing import Any

import msgspec


class GatedMetric(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One metric of the gate. `kept` is how much of the original's quality the compressed model has: the ratio of the
    two values, turned over where lower is better; `low` and `high` are its 95% interval over users."""

    original: float
    compressed: float
    kept: float
    low: float
    high: float
    bound: float

    @property
    def passed(self) -> bool:
        """The whole interval is at the bound or above it."""
        return self.low >= self.bound


class GateRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The decision: on which days (UTC, `until` excluded), requests and users, and the metrics by their names."""

    since: str
    until: str
    num_requests: int
    num_users: int
    sampled: int
    seed: int
    metrics: dict[str, GatedMetric]

    @property
    def passed(self) -> bool:
        """Every metric passed."""
        return all(metric.passed for metric in self.metrics.values())


class Searched(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a search came to a recipe: how many were `tried`, on which days they were compared (UTC, `until` excluded),
    and how many of its recipes have been `judged` on the gate's days so far, this one among them."""

    tried: int
    since: str
    until: str
    judged: int


class Int8Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A version in int8: on which requests its scales were found (`calibration`, of a file also its checksum), which of
    its layers stay in float, what int8 changes of a logit there as a share of the spread of a request's logits
    (`error`), the checksum of the scales, and how the gate judged the quantized graphs.

    `ms` are milliseconds of the recipe's request in floats and in int8 where it was made.
    """

    calibration: str
    calibration_sha256: str
    num_requests: int
    layers: int
    kept: tuple[str, ...]
    error: float
    plan_sha256: str
    gate: GateRecord
    ms: dict[str, float] = {}


class Compression(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A compressed version: its recipe, checksums of what was compressed and of what came out, its size, the gate.

    `flops` and `parameters` are shares of the original's; `ms` are milliseconds of the recipe's request, measured on
    the recipe's target for original and compressed, and predicted, where a budget was given in them; `price_error` is
    the largest relative error of the prediction over the models that it was fitted to. `gate` judges the model in
    float32, `int8.gate` its quantized graphs, if it has them. `search` is there if a search chose the recipe.
    """

    recipe: dict[str, Any]
    original_sha256: str
    weights_sha256: str
    flops: float
    parameters: float
    gate: GateRecord
    ms: dict[str, float] = {}
    price_error: float = 0.0
    search: Searched | msgspec.UnsetType = msgspec.UNSET
    int8: Int8Record | msgspec.UnsetType = msgspec.UNSET
