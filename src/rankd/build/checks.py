"""Checks before an artifact is written: engines compute what the model computes, and the model keeps the rules.

The rules: no candidate sees another one; users in one call do not see each other; a state that was extended is that of
the longer history; tables beside the graph are those of the model. In: a torch model, compiled engines, requests. Out:
the largest difference, or a BuildError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rankd.artifact import Artifact
from rankd.engine.backend import EngineConfig, Executor, Precision
from rankd.engine.state_arrays import APPEND_BUCKETS, write_additions
from rankd.engine.targets import load_backend
from rankd.errors import BuildError
from rankd.features.assembly import appended_tokens
from rankd.models.protocol import logits_of
from rankd.types import Array, Features, Float32Array, UserState

PARITY_BOUNDS = {Precision.FP32: 1e-3, Precision.BF16: 0.5, Precision.INT8: 1.0}
"""Largest allowed |logit - torch float32 logit|. In int8 it finds graphs that are wrong: products that overflow, scales
of other weights; what rounding costs is judged by the accuracy gate."""


def check_split(model: nn.Module, requests: Sequence[Features]) -> None:
    """The scores of all candidates must equal the scores of any part of them: no candidate may see another one.

    Raises:
        BuildError: they differ.
    """
    for features in requests[:4]:
        whole = reference_logits(model, features)
        half = max(features.num_candidates // 2, 1)
        part = {
            name: array[:, :half] if name.startswith("candidate_") else array
            for name, array in features.candidates.items()
        }
        again = reference_logits(model, Features(features.history, part, half))
        worst = float(np.abs(whole[:half] - again).max())
        if not worst <= PARITY_BOUNDS[Precision.FP32]:
            raise BuildError(
                f"scores change by {worst:.2g} when the candidate list is cut in half; a candidate of a ranker must "
                "not see the others (no attention, no normalisation across candidates)"
            )


def check_tables(model: nn.Module, requests: Sequence[Features], embedded: Sequence[Features]) -> None:
    """What was looked up beside the graph, in float32, must give the scores of the tables in the model.

    Raises:
        BuildError: it does not.
    """
    for plain, looked_up in zip(requests, embedded, strict=True):
        worst = float(np.abs(reference_logits(model, plain) - reference_logits(model, looked_up)).max())
        if not worst <= PARITY_BOUNDS[Precision.FP32]:
            raise BuildError(
                f"scores change by {worst:.2g} when rows are looked up beside the graph; row 0 of each table has to be "
                "zeros, and `embedded` has to name the tables that the model reads"
            )


@torch.inference_mode()
def reference_logits(model: nn.Module, features: Features) -> Float32Array:
    """Torch's float32 logits (C, K) of the real candidates."""
    history, candidates = _tensors(features.history), _tensors(features.candidates)
    logits: Float32Array = logits_of(model, history, candidates)[0, : features.num_candidates].numpy()
    return logits


def measure_parity(
    model: nn.Module, artifact: Artifact, target: str, precision: Precision, requests: Sequence[Features]
) -> float:
    """max |logit - torch float32 logit| of a target over requests: plain, in pairs of users, and with extended states.

    Raises:
        BuildError: above the precision's bound, or not a number.
        ArtifactError: the graphs do not compile.
    """
    config = EngineConfig(target=target, precision=precision, executors=1)
    backend = load_backend(artifact, config)
    executor = backend.executor()
    expected = [reference_logits(model, features) for features in requests]
    worst = {"alone": 0.0, "two users in one call": 0.0, "a state that was extended": 0.0}

    def note(kind: str, logits: Float32Array, number: int) -> None:
        difference = float(np.abs(logits[: len(expected[number])] - expected[number]).max())
        worst[kind] = difference if np.isnan(difference) else max(worst[kind], difference)

    states = []
    for number, features in enumerate(requests):
        states.append(kept_state(executor, features.history))
        note("alone", executor.score([states[-1]], features.candidates)[0], number)
    for number, features in enumerate(requests[:-1]):
        other = _as_long(requests[number + 1].candidates, features.candidates)
        both = {name: np.concatenate([array, other[name]]) for name, array in features.candidates.items()}
        note("two users in one call", executor.score(states[number : number + 2], both)[0], number)
    if artifact.manifest.extends:
        for number, features in enumerate(requests):
            state = extended_state(executor, artifact, features.history)
            note("a state that was extended", executor.score([state], features.candidates)[0], number)
    for kind, difference in worst.items():
        if not difference <= PARITY_BOUNDS[precision]:
            raise BuildError(
                f"{target} differs from the torch model by {difference:.3g} in {precision.value} ({kind}); "
                f"allowed is {PARITY_BOUNDS[precision]:g}"
            )
    return max(worst.values())


def kept_state(executor: Executor, history: Mapping[str, Array]) -> UserState:
    """The state of a history in arrays of its own."""
    arrays = {name: np.array(array) for name, array in executor.encode(history).items()}
    return UserState(arrays, tuple(history["history_length"][0].tolist()))


def extended_state(executor: Executor, artifact: Artifact, history: Mapping[str, Array]) -> UserState:
    """The state of a history, made in two steps: of all but the newest few events, and those appended."""
    lengths = history["history_length"][0]
    counts = np.minimum(lengths, np.arange(3, 3 + len(lengths)))
    before = {**history, "history_length": (lengths - counts)[None].astype(np.int32)}
    state = kept_state(executor, before)
    new = appended_tokens(history, state.lengths, APPEND_BUCKETS)
    write_additions(artifact.manifest.state, state.arrays, state.lengths, executor.extend(state, new), counts.tolist())
    return UserState(state.arrays, tuple(lengths.tolist()))


def _as_long(arrays: Mapping[str, Array], model: Mapping[str, Array]) -> dict[str, Array]:
    """Candidates of one request, cut or repeated to as many rows as another one has."""
    rows = model["candidate_item"].shape[1]
    index = np.arange(rows) % arrays["candidate_item"].shape[1]
    return {name: array[:, index] if name.startswith("candidate_") else array for name, array in arrays.items()}


def _tensors(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
