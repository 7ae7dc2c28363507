"""What a contestant of the suite `engine` is made of: its calls, and the dense model's exports that several run.

Next: `contestants.py` and `gpu_contestants.py` make them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankd.artifact import Artifact
from rankd.bench.engine_suite.contestant_messages import Load, Work
from rankd.types import Array, Features, Float32Array


@dataclass(frozen=True, slots=True)
class Calls:
    """`call(i)` is timed; `logits(i)` gives the (B, C, K) float32 that the same computation leads to."""

    call: Callable[[int], object]
    logits: Callable[[int], Float32Array]


def ort_calls_on(
    load: Load, requests: Sequence[Features], exported: Path, providers: Sequence[str]
) -> dict[Work, Calls]:
    """ONNX Runtime on the dense export, where `providers` compute."""
    import onnxruntime  # type: ignore[import-untyped,unused-ignore]

    path = exported / "score.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = load.threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads idle while others are timed
    if same_shapes(requests):
        history, candidates = requests[0].history["history_item"], requests[0].candidates["candidate_item"]
        for dimension, size in (("B", len(history)), ("T", history.shape[-1]), ("C", candidates.shape[-1])):
            options.add_free_dimension_override_by_name(dimension, size)
    session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    wanted = [port.name for port in session.get_inputs()]
    feeds = [{name: array for name, array in arrays_of(one).items() if name in wanted} for one in requests]

    def call(i: int) -> Float32Array:
        logits: Float32Array = session.run(None, feeds[i])[0][:, : requests[i].num_candidates]
        return logits

    return {Work.COLD: Calls(call, call)}


def export_dense(load: Load, target: str) -> Path:
    """The folder of the dense model's graph; exported by the first process of a run that asks."""
    from rankd.bench.engine_suite.dense_model import dense_form
    from rankd.bench.parity import torch_model
    from rankd.build.export import export

    artifact, folder = Artifact.open(Path(load.artifact)), Path(load.scratch) / f"dense-{target}"
    if not folder.exists():
        export(dense_form(torch_model(artifact)), artifact.schema, target, folder)
    return folder


def same_shapes(requests: Sequence[Features]) -> bool:
    """Whether a graph of fixed shapes does for all requests."""
    return len({tuple(array.shape for array in arrays_of(one).values()) for one in requests}) == 1


def arrays_of(features: Features) -> dict[str, Array]:
    """All inputs of the dense model."""
    return {**features.history, **features.candidates}
