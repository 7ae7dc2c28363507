"""What keeping a state costs: users a GiB, and the error of a logit that each kind of storage causes.

In: a version folder and requests. The states are computed in float32, kept, read back, and scored in float32, so that
the difference is the storage's alone. Out: a row for each storage.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rankd.artifact import Artifact
from rankd.engine.backend import EngineConfig, Precision, StateType
from rankd.engine.targets import load_backend
from rankd.states.state_config import Storage
from rankd.states.storage import StateLayout
from rankd.types import Features, UserState

GIB = 1 << 30


def storage_errors(artifact: Artifact, requests: Sequence[Features]) -> dict[str, dict[str, float]]:
    """{"bf16": {"state_bytes": ..., "states_per_gib": ..., "max_error": ..., "mean_error": ...}, ...}.

    A state has room for the largest history bucket. Errors are of logits, against the state that was not kept.
    """
    config = EngineConfig("openvino", Precision.FP32, executors=1)
    executor = load_backend(artifact, config, StateType.FP32).executor()
    specs, room = artifact.manifest.state, artifact.schema.history_buckets[-1]
    rows = {}
    for storage in (Storage.FP32, Storage.BF16, Storage.INT8):
        layout = StateLayout(specs, StateType.FP32, storage)
        errors = []
        for one in requests:
            lengths = tuple(one.history["history_length"][0].tolist())
            tokens = one.history["history_item"].shape[2]
            exact = executor.encode(one.history)
            expected = executor.score([UserState(exact, lengths)], one.candidates)
            stored = layout.arrays(np.zeros(layout.size_bytes(tokens), np.uint8), tokens)
            layout.pack(exact, stored)
            kept = UserState(layout.unpack(stored, tokens), lengths)
            errors.append(np.abs(executor.score([kept], one.candidates) - expected)[0, : one.num_candidates])
        size = layout.size_bytes(room)
        rows[storage.value] = {
            "state_bytes": float(size),
            "states_per_gib": float(GIB // size),
            "max_error": float(max(error.max() for error in errors)),
            "mean_error": float(np.mean([error.mean() for error in errors])),
        }
    return rows
