"""All checks and benchmarks of the target `cuda` on the GPU of this machine, in one command; ends with one JSON file.

    python benchmarks/gpu.py [--out gpu.json] [--skip-tests] [--rehearse]

From the root of a checkout with the extras `dev` and `cuda`. The GPU's own limits first. Then for each workload: its
model is built, which holds the whole executor to torch; whole requests beside torch in one run (`gpu_requests.py`);
calls in flight, states that travel, and attention alone (`gpu_parts.py`). Then whether it ranks as well
(`gpu_ranks.py`), schedules, the tests of the kernels on the GPU, and last what torch has to compile. What a part gives
is in the file when it ends; one that fails is named there and the others go on; what is not begun when the time is up
is left out.

`--rehearse` runs all of it without a GPU, on tiny models, kernels in Triton's interpreter: it shows that the script
itself works. Its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpu_parts import attention_alone, in_flight
from gpu_place import ROOT, Call, Place, device_ms, place_for
from gpu_requests import COMPILED_TORCH, TORCH, of_users
from rankd.artifact import Artifact
from rankd.bench.peak import gpu_peak_gflops
from rankd.bench.report import commit, machine
from rankd.bench.synthetic_model import build_model
from rankd.bench.workload import Workload

TEST_SECONDS = 180
BEGIN_BEFORE = 500.0
"""Seconds from the start after which nothing is begun: there are ten minutes."""
LONG = 1024
"""Tokens a block above which the processor takes seconds for a request: then one is held to torch, not eight."""
STARTED = time.perf_counter()
Parts = dict[str, Any]


def main() -> int:
    """0: everything ran; 1: a part failed, and the file says which; 2: there is no GPU to run on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="Where the JSON goes.")
    parser.add_argument("--skip-tests", action="store_true", help="Leave the tests of the kernels out.")
    parser.add_argument("--rehearse", action="store_true", help="Run it all on tiny models without a GPU.")
    options = parser.parse_args()
    place = place_for(options.rehearse)
    if isinstance(place, str):
        print(f"Nothing was measured: {place}. This script needs an NVIDIA GPU; the tests run without one (make test).")
        return 2
    parts: Parts = {"suite": "gpu", "commit": commit(), "machine": machine() | versions(place), "failed": {}}
    parts |= {"rehearsal": "these figures mean nothing"} if place.rehearses else {}
    attempt = Attempts(parts, options.out)
    attempt("limits", partial(limits, place))
    with tempfile.TemporaryDirectory(prefix="rankd-gpu-") as folder:
        for workload in place.workloads():
            whole_requests(place, workload, attempt, Path(folder))
        attempt("ranks", partial(ranks_as_well, place))
        for name in ("mixed", "skewed"):
            attempt(f"schedule {name}", partial(scheduled, place, name))
        if not options.skip_tests and not place.rehearses:
            attempt("kernel_tests", run_tests)
        for workload in place.workloads():
            attempt(f"{workload.name} beside compiled", partial(beside_compiled, place, workload, Path(folder)))
    print(json.dumps(parts))
    return 1 if parts["failed"] else 0


class Attempts:
    """Runs parts, as long as there is time. One that fails must not cost the others their figures, and whoever ends the
    script finds in the file what it had by then."""

    def __init__(self, parts: Parts, out: Path) -> None:
        self.parts, self._out = parts, out

    def __call__(self, name: str, part: Callable[[], Any]) -> Any:
        """What a part gives, which is noted under its name; None if it failed."""
        started = time.perf_counter()
        if started - STARTED > BEGIN_BEFORE:
            self.parts["failed"][name] = "no time left"
            return None
        try:
            self.parts[name] = part()
        except Exception as error:  # noqa: BLE001 - the script's edge: the reason goes into the file
            self.parts["failed"][name] = f"{type(error).__name__}: {error}"[-3000:]
        self._out.write_text(json.dumps(self.parts, indent=1) + "\n")
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        return self.parts.get(name)


def versions(place: Place) -> dict[str, str]:
    """What computes."""
    import torch
    import triton

    if place.rehearses:
        return {"gpu": "none: a rehearsal", "torch": torch.__version__, "triton": triton.__version__}
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return {
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": capability,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def run_tests() -> dict[str, Any]:
    """The tests of the kernels, on the GPU, each in its first configuration.

    Raises:
        AssertionError: one of them failed; the end of what they said.
    """
    environment = os.environ | {"RANKD_TEST_GPU": "1", "RANKD_CUDA_TUNE": "off"}
    files = [f"tests/engine/cuda/test_{name}_kernels.py" for name in ("attention", "row", "host")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(  # noqa: S603 - our own interpreter
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TEST_SECONDS
    )
    if done.returncode != 0:
        raise AssertionError(done.stdout[-3000:] + done.stderr[-1000:])
    return {"passed": int(re.findall(r"(\d+) passed", done.stdout)[-1])}


def limits(place: Place) -> dict[str, float]:
    """What the GPU can: a bfloat16 matrix product, a copy within its memory, a copy from pinned memory."""
    import torch

    source = torch.empty(place.side**2 * 16, dtype=torch.uint8, device=place.name)
    target, pinned = torch.empty_like(source), torch.empty(len(source) // 4, dtype=torch.uint8)
    pinned = pinned if place.rehearses else pinned.pin_memory()

    def gbps(num_bytes: int, call: Call) -> float:
        return num_bytes / device_ms(place, call) / 1e6

    return {
        "bf16_tflops": gpu_peak_gflops("bf16", place.name, place.side) / 1e3,
        "copy_gbps": gbps(2 * source.nbytes, lambda: target.copy_(source)),
        "h2d_gbps": gbps(pinned.nbytes, lambda: target[: pinned.nbytes].copy_(pinned, non_blocking=True)),
    }


def whole_requests(place: Place, workload: Workload, attempt: Attempts, folder: Path) -> None:
    """A workload's model built for the GPU (which checks it against torch), then requests of 1, 8 and 32 users."""
    name = workload.name
    peak = (attempt.parts.get("limits") or {}).get("bf16_tflops")
    parity = attempt(f"{name} built", partial(built, place, workload, folder))
    if parity is None:
        return
    artifact = Artifact.open(folder / name / "1")
    for users in place.users:
        attempt(f"{name} of {users}", partial(of_users, place, artifact, workload, users, TORCH, peak))
    attempt(f"{name} in flight", partial(in_flight, place, artifact, workload))
    attempt(f"{name} attention", partial(attention_alone, place, workload, peak))


def beside_compiled(place: Place, workload: Workload, folder: Path) -> dict[str, Any]:
    """Requests of a few users beside what torch compiles, which takes it minutes: when all else is measured."""
    artifact = Artifact.open(folder / workload.name / "1")
    return of_users(place, artifact, workload, place.flight_users, COMPILED_TORCH, None)


def built(place: Place, workload: Workload, folder: Path) -> dict[str, float]:
    """Make `<folder>/<workload>/1`, in a process whose kernels are not tuned, for nothing is timed; its largest
    differences from torch by precision."""
    if place.rehearses:
        build_model(workload, folder)
        return {}
    code = (
        "import sys; from pathlib import Path; from rankd.bench.synthetic_model import build_model; "
        "from rankd.bench.workload import load_workload; from rankd.engine.backend import Precision; "
        "build_model(load_workload(sys.argv[1]), Path(sys.argv[2]), ('cuda',), Precision.BF16, int(sys.argv[3]))"
    )
    requests = "1" if workload.block_tokens > LONG else "8"
    untuned(["-c", code, workload.name, str(folder), requests])
    return dict(Artifact.open(folder / workload.name / "1").manifest.engines["cuda"].parity)


def ranks_as_well(place: Place) -> Any:
    """NDCG@10 of the packaged model on the GPU beside float32 on the processor (`gpu_ranks.py`).

    Raises:
        AssertionError: it loses more than is allowed.
    """
    options = ["--events", "1", "--rehearse"] if place.rehearses else []
    return json.loads(untuned([str(ROOT / "benchmarks" / "gpu_ranks.py"), *options]).splitlines()[-1])


def scheduled(place: Place, name: str) -> Any:
    """Uneven requests through the schedule in made-up time, with what calls take on this GPU, beside fixed shapes."""
    target, workload = ("openvino", "small") if place.rehearses else ("cuda", name)
    command = ["-m", "rankd", "bench", "schedule", "--simulate", "--json", "--seconds", "3"]
    return json.loads(untuned([*command, "--workload", workload, "--target", target]).splitlines()[-1])["ratios"]


def untuned(arguments: list[str]) -> str:
    """What a process of our interpreter prints whose kernels are not tuned: dozens of buckets would take minutes each.

    Raises:
        AssertionError: it failed; the end of what it said.
    """
    environment = os.environ | {"RANKD_CUDA_TUNE": "off"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)  # noqa: S603 - our own interpreter
    if done.returncode != 0:
        raise AssertionError(done.stdout[-1000:] + done.stderr[-3000:])
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
