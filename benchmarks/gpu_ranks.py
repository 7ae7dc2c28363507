"""Whether the GPU ranks as well: NDCG@10 of the packaged model on the test time of its seeded log, for `gpu.py`.

    python benchmarks/gpu_ranks.py [--events 2000] [--rehearse]

Ends with one line of JSON. The model as OpenVINO computes it in float32 on the processor, and as the target `cuda` does
in bfloat16, with pages in bfloat16 and in e4m3; on the same events, paired. `--rehearse`: in Triton's interpreter,
which rounds as a GPU does, a few events a minute; so its figures do mean something.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_place import Place, backend_of, place_for
from rankd.artifact import Artifact
from rankd.bench.parity import BOUNDS
from rankd.demo import MODELS
from rankd.engine.backend import EngineConfig, GpuStorage, Precision
from rankd.engine.targets import load_backend

METRIC, BOUND = "ndcg@10", 1e-3
"""What is compared, and how much of it may be lost on the GPU."""
SAMPLED = 100


def main() -> int:
    """0: it ranks as well; 1: it does not; 2: there is no GPU to run on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--events", type=int, default=2000, help="Of the test time, spread over it.")
    parser.add_argument("--rehearse", action="store_true", help="In the interpreter, without a GPU.")
    options = parser.parse_args()
    place = place_for(options.rehearse)
    if isinstance(place, str):
        print(f"Nothing was measured: {place}")
        return 2
    found = ranks(place, options.events)
    print(json.dumps(found))
    return 0 if all(one["difference"] >= -BOUND for one in found["gpu"].values()) else 1


def ranks(place: Place, count: int) -> dict[str, Any]:
    """The metric on the processor, and for each storage the GPU's with its relative difference and the interval of it
    over users, and the largest difference of a score."""
    import numpy as np

    from rankd.train.evaluation import score_events
    from rankd.train.ranking_metrics import difference, evaluate
    from rankd.train.run import executor_scorer

    artifact = Artifact.open(MODELS / "demo" / "1")
    dataset, events = demo_events(count)

    def scored(backend: Any) -> Any:
        return score_events(events, executor_scorer(artifact, backend.executor(), dataset), dataset.schema, True)

    plain = scored(load_backend(artifact, EngineConfig("openvino", Precision.FP32, executors=1)))
    expected = evaluate(plain)[METRIC].value
    made: dict[str, Any] = {"events": len(events), METRIC: expected, "gpu": {}}
    for storage in (GpuStorage.AUTO, GpuStorage.FP8):
        ours = scored(backend_of(place, artifact, 1, 1, storage, rehearsed=64))
        apart = difference(ours, plain)[METRIC]
        worst = max(np.abs(a - b).max() for a, b in zip(ours.scores, plain.scores, strict=True))
        made["gpu"]["bf16" if storage is GpuStorage.AUTO else "fp8"] = {
            METRIC: evaluate(ours)[METRIC].value,
            "difference": apart.value / expected,
            "interval": [apart.low / expected, apart.high / expected],
            "largest_score_difference": float(worst),
            "allowed_score_difference": BOUNDS["bf16"],
        }
    return made


def demo_events(count: int) -> tuple[Any, list[Any]]:
    """The dataset of the packaged model's log, and so many test events, spread over the test time."""
    from rankd.train.description import LogDescription
    from rankd.train.evaluation import make_test_events
    from rankd.train.interactions import read_log
    from rankd.train.recipe import Recipe
    from rankd.train.run import packaged_or_file
    from rankd.train.samples import prepare
    from rankd.train.synthetic import synthetic_log

    with tempfile.TemporaryDirectory(prefix="rankd-gpu-") as folder:
        path = Path(folder) / "demo.parquet"
        synthetic_log().write_parquet(path)
        log = read_log(path, packaged_or_file(LogDescription, "logs", "demo"))
    dataset = prepare(log, packaged_or_file(Recipe, "recipes", "demo").shapes)
    events, _ = make_test_events(dataset, dataset.validate_until, dataset.schema.log_end + 1, SAMPLED, 0)
    return dataset, events[:: max(len(events) // count, 1)][:count]


if __name__ == "__main__":
    sys.exit(main())
