"""Parity before any timing: all contestants give the same scores, and they are the torch module's.

In: an artifact and requests. Out: the scores each contestant is held to, and the largest differences.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rankd.artifact import Artifact
from rankd.errors import EngineFailure
from rankd.features.assembly import assemble
from rankd.features.reading.stored_events import empty_history
from rankd.features.reading.version_features import VersionFeatures
from rankd.features.requests import request_time
from rankd.types import Features, Float32Array, RankRequest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rankd.ranker import Ranker

BOUNDS = {"fp32": 1e-3, "bf16": 0.5}
"""Largest allowed |logit - torch float32 logit|, by the precision of the engine (those of `build.pack`)."""

SAME = {"fp32": 1e-4, "bf16": 0.05}
"""Largest allowed difference of a logit between contestants, by precision: they run the same graphs, but each cuts a
list where it found that cheapest, and a call of another shape rounds otherwise."""


def scores_in_process(ranker: Ranker, requests: Sequence[RankRequest]) -> list[Float32Array]:
    """What every other contestant is held to: (C, K) float32 for each request."""
    return [ranker.rank(request).scores for request in requests]


def against_torch(ranker: Ranker, requests: Sequence[RankRequest], scores: Sequence[Float32Array]) -> float:
    """max |score - torch float32 logit| over requests; the figure that the build wrote down if torch is not installed.

    Raises:
        EngineFailure: above the bound of the engine's precision.
    """
    artifact, precision = ranker.artifact, ranker.backend.precision.value
    if importlib.util.find_spec("torch") is None:
        worst = max(record.parity[precision] for record in artifact.manifest.engines.values())
    else:
        reference = torch_logits(artifact, [features_of(ranker, request) for request in requests])
        worst = max_difference(scores, reference)
    if not worst <= BOUNDS[precision]:
        raise EngineFailure(
            f"the scores of {artifact.path} differ from torch by {worst:.3g} in {precision}; at most "
            f"{BOUNDS[precision]:g} is allowed, so nothing is measured"
        )
    return worst


def check_same(contestant: str, expected: Sequence[Float32Array], given: Sequence[Float32Array], bound: float) -> float:
    """The largest difference of a contestant's scores; `bound` is what is allowed, mostly SAME of the precision.

    Raises:
        EngineFailure: above it.
    """
    worst = max_difference(expected, given)
    if not worst <= bound:
        raise EngineFailure(
            f"the scores of {contestant} differ from those in process by {worst:.3g}; at most {bound:g} is "
            "allowed, so nothing is measured"
        )
    return worst


def max_difference(expected: Sequence[Float32Array], given: Sequence[Float32Array]) -> float:
    """max |a - b| over pairs of arrays; infinite where shapes differ."""
    pairs = list(zip(expected, given, strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def features_of(ranker: Ranker, request: RankRequest) -> Features:
    """What the ranker feeds its graphs for a request about a stored user."""
    return stored_features(ranker.features, request)


def stored_features(features: VersionFeatures, request: RankRequest) -> Features:
    """The same without a ranker."""
    schema = features.schema
    history = features.stored_history(request.user_id) or empty_history(schema)
    rows, now = features.catalogue.rows_of(request.candidates), request_time(request, schema, history)
    return assemble(schema, features.items, history, rows, features.user_features(request.user_id), now)


def torch_model(artifact: Artifact) -> nn.Module:
    """The artifact's model in torch, float32, from its reference weights."""
    from rankd.models.protocol import load_model

    manifest = artifact.manifest
    return load_model(manifest.model, manifest.schema, manifest.options, artifact.path / "weights.safetensors")


def torch_inputs(features: Features) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """History and candidates as tensors over the same memory."""
    import torch

    history, candidates = (
        {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        for arrays in (features.history, features.candidates)
    )
    return history, candidates


def torch_logits(artifact: Artifact, requests: Sequence[Features]) -> list[Float32Array]:
    """Logits (C, K) float32 of each request, without padding: the reference."""
    from rankd.build.checks import reference_logits

    model = torch_model(artifact)
    return [reference_logits(model, features) for features in requests]
