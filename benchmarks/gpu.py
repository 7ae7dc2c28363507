"""All checks and benchmarks of the target `cuda` on the GPU of this machine, in one command; ends with one JSON file.

    python benchmarks/gpu.py [--out gpu.json] [--skip-tests] [--rehearse]

From the root of a checkout with the extras `dev` and `cuda`. Parity first: the tests of the kernels run on the GPU, and
models are built for it, which checks the whole executor against torch. Then the GPU's own limits, whole requests
beside torch in one run, states in GPU memory beside states that travel, calls in flight, and kernels alone. A part that
fails is named in the file and the others go on; what has to be compiled is left out when the time is up.

`--rehearse` runs all of it without a GPU, on tiny models, kernels in Triton's interpreter: it shows that the script
itself works. Its figures mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rankd.artifact import Artifact
from rankd.bench.flops import ModelKind
from rankd.bench.peak import gpu_peak_gflops
from rankd.bench.report import commit, machine
from rankd.bench.synthetic_model import build_model
from rankd.bench.workload import Workload, load_workload
from rankd.engine.backend import MOST_IN_FLIGHT, EngineConfig, Precision
from rankd.engine.cuda import gpu_presence
from rankd.engine.state_arrays import empty_state
from rankd.engine.targets import load_backend
from rankd.errors import EngineFailure
from rankd.features.schema import TensorSpec
from rankd.types import Allocate, Array, UserState

ROOT = Path(__file__).resolve().parents[1]
TEST_SECONDS = 180
COMPILE_BEFORE, BEGIN_BEFORE = 360.0, 500.0
"""Seconds from the start after which torch compiles nothing more, and no users are begun: there are ten minutes."""
LONG = 1024
"""Tokens a block above which the processor takes seconds for a request: then one is held to torch, not eight."""
BOUND, OWN_BOUND = 0.5, 1e-2
"""Of a logit, as `bench.parity.BOUNDS` has it for bf16; and of ours, over the largest logit."""
TURN_SECONDS, FEWEST = 10.0, 5
"""All calls of all contestants take about so long, with at least so many of each."""
STARTED = time.perf_counter()
MARKS = itertools.count(1)
Parts = dict[str, Any]
Call = Callable[[], object]


@dataclass(frozen=True)
class Place:
    """Where it is computed, by torch's name, and how much: users of a call, calls of each contestant, seconds of a
    rate, the sides of the matrix whose product is the limit."""

    name: str
    users: tuple[int, ...]
    calls: int
    rate_seconds: float
    side: int
    workloads: Callable[[], list[Workload]]

    @property
    def rehearses(self) -> bool:
        """Whether no figure means anything."""
        return self.name == "cpu"

    @property
    def flight_users(self) -> int:
        """Of each call, where many calls are under way."""
        return self.users[1]


GPU = Place(
    "cuda", (1, 8, 32), 30, 0.5, 8192, lambda: [load_workload(name) for name in ("base", "long", "hstu", "hstu-long")]
)


def rehearsal() -> list[Workload]:
    """A Climber and an HSTU whose calls take seconds in the interpreter."""
    made = []
    for name in ("base", "hstu"):
        whole = load_workload(name)
        model = msgspec.structs.replace(whole.model, layers=2, width=16, heads=1, hidden=16)
        buckets = msgspec.structs.replace(whole.buckets, history=(24,), candidates=(8,))
        history, candidates = (msgspec.structs.replace(law, value=size) for law, size in
                               ((whole.history, 24 * model.blocks), (whole.candidates, 8)))  # fmt: skip
        made.append(
            msgspec.structs.replace(
                whole, model=model, buckets=buckets, history=history, candidates=candidates, items=50,
                users=msgspec.structs.replace(whole.users, count=20),
            )
        )  # fmt: skip
    return made


PROCESSOR = Place("cpu", (1, 2), 1, 0.01, 64, rehearsal)


def main() -> int:
    """0: everything ran; 1: a part failed, and the file says which; 2: there is no GPU to run on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="Where the JSON goes.")
    parser.add_argument("--skip-tests", action="store_true", help="Leave the tests of the kernels out.")
    parser.add_argument("--rehearse", action="store_true", help="Run it all on tiny models without a GPU.")
    options = parser.parse_args()
    place = PROCESSOR if options.rehearse else GPU
    if place.rehearses:
        os.environ["TRITON_INTERPRET"] = "1"
        sys.path.insert(0, str(ROOT))  # tests.engine.cuda.interpreted_device
    elif reason := gpu_presence.why_not():
        print(
            f"Nothing was measured: {reason}. This script needs an NVIDIA GPU; the tests run without one (make test)."
        )
        return 2
    parts: Parts = {"suite": "gpu", "commit": commit(), "machine": machine() | versions(place), "failed": {}}
    parts |= {"rehearsal": "these figures mean nothing"} if place.rehearses else {}
    attempt = Attempts(parts, options.out)
    attempt("limits", partial(limits, place))
    if not options.skip_tests and not place.rehearses:
        attempt("kernel_tests", run_tests)
    for workload in place.workloads():
        whole_requests(place, workload, attempt)
    for name in ("mixed", "skewed"):
        attempt(f"schedule {name}", partial(scheduled, place, name))
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


def device_ms(place: Place, call: Callable[[], object]) -> float:
    """Median milliseconds between events around a call, after three that do not count."""
    import torch

    if place.rehearses:
        return whole_ms(place, {"": call})[""]
    for _ in range(3):
        call()
    spent: list[float] = []
    for _ in range(place.calls):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end))
    return statistics.median(spent)


def whole_ms(place: Place, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of whole calls, what the host does included, the contestants in turn."""
    import torch

    def wait() -> None:
        if not place.rehearses:
            torch.cuda.synchronize()

    rounds = place.calls
    started = time.perf_counter()
    for call in calls.values():
        call()
    wait()
    rounds = max(min(rounds, int(TURN_SECONDS / (time.perf_counter() - started))), min(rounds, FEWEST))
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            wait()
            started = time.perf_counter()
            call()
            wait()
            spent[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(times) for name, times in spent.items()}


def whole_requests(place: Place, workload: Workload, attempt: Attempts) -> None:
    """A workload's model built for the GPU (which checks it against torch), then requests of 1, 8 and 32 users."""
    name = workload.name
    peak = (attempt.parts.get("limits") or {}).get("bf16_tflops")
    with tempfile.TemporaryDirectory(prefix="rankd-gpu-") as folder:
        path = attempt(f"{name} built", lambda: str(built(place, workload, Path(folder))))
        if path is None:
            return
        artifact = Artifact.open(Path(path))
        record = artifact.manifest.engines.get("cuda")
        attempt.parts[f"{name} built"] = record.parity if record else {}
        for users in place.users:
            attempt(f"{name} of {users}", partial(of_users, place, artifact, workload, users, peak))
        attempt(f"{name} in flight", partial(in_flight, place, artifact, workload))
    attempt(f"{name} attention", partial(attention_alone, place, workload, peak))


def of_users(place: Place, artifact: Artifact, workload: Workload, users: int, peak: float | None) -> dict[str, Any]:
    """All contestants with so many users in a call."""
    calls, left_out, parity = contestants(place, artifact, workload, users)
    took = whole_ms(place, calls)
    peers = [name for name in took if not name.startswith("rankd") and name != EAGER]

    def over(name: str, other: str = EAGER) -> float | None:
        return took[other] / took[name] if other in took else None

    return {
        "ms": took,
        "left_out": left_out,
        "parity": parity,
        "speedup_cold": over("rankd cold"),
        "speedup_warm": over("rankd warm"),
        "speedup_warm_sent": over("rankd warm, states sent"),
        "gpu_hit_gain": over("rankd warm", "rankd warm, states sent"),
        "pinned_gain": over("rankd warm, states sent", "rankd warm, states staged"),
        "pinned_gain_cold": over("rankd cold", "rankd cold, staged"),
        "over_best_peer_cold": over("rankd cold", min(peers, key=took.__getitem__)) if peers else None,
        "peak_share": workload.flops().useful * users / took["rankd cold"] / 1e9 / peak if peak else None,
    }


def built(place: Place, workload: Workload, folder: Path) -> Path:
    """The version folder of the workload's model. Made in a process whose kernels are not tuned: nothing is timed."""
    if place.rehearses:
        return build_model(workload, folder)
    code = (
        "import sys; from pathlib import Path; from rankd.bench.synthetic_model import build_model; "
        "from rankd.bench.workload import load_workload; from rankd.engine.backend import Precision; "
        "given = load_workload(sys.argv[1]), Path(sys.argv[2]), ('cuda',), Precision.BF16, int(sys.argv[3]); "
        "print(build_model(*given))"
    )
    requests = "1" if workload.block_tokens > LONG else "8"
    command = [sys.executable, "-c", code, workload.name, str(folder), requests]
    environment = os.environ | {"RANKD_CUDA_TUNE": "off"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)  # noqa: S603 - our own interpreter
    if done.returncode != 0:
        raise AssertionError(done.stderr[-3000:])
    return Path(done.stdout.splitlines()[-1])


def backend_of(place: Place, artifact: Artifact, executors: int, calls_in_flight: int) -> Any:
    """The target, with so many groups of streams and calls under way on each."""
    from rankd.engine.cuda.cuda_backend import CudaBackend

    config = EngineConfig("cuda", Precision.BF16, executors, gpu_state_mib=16384, calls_in_flight=calls_in_flight)
    if not place.rehearses:
        return load_backend(artifact, config)
    return CudaBackend(
        gpu_model(place, artifact), device_class(place), msgspec.structs.replace(config, gpu_state_mib=8)
    )


def gpu_model(place: Place, artifact: Artifact) -> Any:
    """An artifact's weights where calls read them."""
    from rankd.engine.cuda.cuda_backend import model_of

    sizes = {"tile": 16, "page": 16} if place.rehearses else {}
    return model_of(artifact, Precision.BF16, lambda tensor: tensor.to(place.name), **sizes)


def device_class(place: Place) -> Any:
    """What a `Device` is here."""
    if place.rehearses:
        from tests.engine.cuda.interpreted_device import InterpretedDevice

        return InterpretedDevice
    from rankd.engine.cuda.cuda_device import CudaStreams

    return CudaStreams


EAGER = "eager bf16, dense mask"
TORCH = {
    EAGER: ("plain", False),
    "sdpa bf16, dense mask": ("sdpa", False),
    "torch.compile bf16, dense mask": ("plain", True),
    "flex attention bf16, compiled": ("flex", True),
}
COMPILED = "max-autotune"
"""How each of torch's contestants attends, and whether it is compiled."""


def contestants(
    place: Place, artifact: Artifact, workload: Workload, users: int
) -> tuple[dict[str, Call], dict[str, str], dict[str, float]]:
    """Calls on the same inputs, the reasons of those that are left out, and by how much logits differ from torch's."""
    import torch

    from rankd.bench.engine_suite.dense_attention import Attention
    from rankd.bench.engine_suite.dense_model import dense_form
    from rankd.bench.parity import torch_model

    histories, candidates = inputs_of(artifact, workload, users)
    together = {name: np.concatenate([history[name] for history in histories]) for name in histories[0]}
    sides = [{n: torch.from_numpy(a).to(place.name) for n, a in side.items()} for side in (together, candidates)]
    with torch.inference_mode():
        plain = dense_form(torch_model(artifact)).eval().to(place.name)
        ones = [[{n: t[user : user + 1] for n, t in side.items()} for side in sides] for user in range(users)]
        expected = np.concatenate([plain(*one).cpu().numpy() for one in ones])  # together they may be too large
    del plain

    def autocast(run: Any) -> Call:
        def call() -> object:
            with torch.inference_mode(), torch.autocast(place.name, torch.bfloat16):
                return run(*sides).float().cpu().numpy()

        return call

    calls = rankd_calls(backend_of(place, artifact, 1, 1), histories, candidates)
    left_out, parity = dict[str, str](), dict[str, float]()
    for name, (attention, compiled) in TORCH.items():
        if compiled and time.perf_counter() - STARTED > COMPILE_BEFORE:
            left_out[name] = "no time left to compile it"
            continue
        torch._dynamo.reset()
        model = dense_form(torch_model(artifact), Attention(attention)).eval().to(place.name)
        calls[name] = autocast(torch.compile(model, mode=COMPILED) if compiled and not place.rehearses else model)
    for name in list(calls):
        try:
            bound = OWN_BOUND * float(np.abs(expected).max()) if name.startswith("rankd") else BOUND
            parity[name] = differs(expected, calls[name](), bound)
        except Exception as error:
            if name.startswith("rankd"):
                raise
            left_out[name] = f"{type(error).__name__}: {error}"[:500]
            del calls[name]
        if not place.rehearses:
            torch.cuda.empty_cache()  # what one needed is no memory that others lack
    return calls, left_out, parity


def differs(expected: Array, made: Any, bound: float = BOUND) -> float:
    """The largest difference of a logit.

    Raises:
        EngineFailure: it is above the bound.
    """
    worst = float(np.abs(expected - made).max())
    if not worst <= bound:
        raise EngineFailure(f"its scores differ from torch by {worst:.3g}; allowed is {bound:g}")
    return worst


def rankd_calls(backend: Any, histories: Sequence[dict[str, Array]], candidates: dict[str, Array]) -> dict[str, Call]:
    """Ours: states made anew, found in GPU memory, and sent from the host's. Those of the host lie in locked memory, as
    they do while it serves; "staged": in ordinary memory, so that the host copies them into pinned blocks and out."""
    executor: Any = backend.executor()
    kept = marked_states(executor, histories, backend.host_memory)
    sent = [UserState(state.arrays, state.lengths) for state in kept]
    staged = [UserState({name: a.copy() for name, a in state.arrays.items()}, state.lengths) for state in kept]
    homes = arrays_for(executor, histories, backend.host_memory)

    def cold(into: Sequence[dict[str, Array] | None]) -> object:
        made = executor.encode_all(histories, into)
        marks = [next(MARKS).to_bytes(8, "little") for _ in histories]
        executor.keep_all(marks)
        states = [UserState(a, one.lengths, m) for a, one, m in zip(made, kept, marks, strict=True)]
        return executor.score(states, candidates)

    return {
        "rankd cold": lambda: cold(homes),
        "rankd cold, staged": lambda: cold([None] * len(histories)),
        "rankd warm": lambda: executor.score(kept, candidates),
        "rankd warm, states sent": lambda: executor.score(sent, candidates),
        "rankd warm, states staged": lambda: executor.score(staged, candidates),
    }


def arrays_for(executor: Any, histories: Sequence[dict[str, Array]], memory: Allocate | None) -> list[dict[str, Array]]:
    """Arrays for the states of histories, in memory of a kind."""
    model, rooms = executor._model, [history["history_time"].shape[2] for history in histories]
    return [empty_state(model.specs, room, model.state_type, memory=memory) for room in rooms]


def marked_states(
    executor: Any, histories: Sequence[dict[str, Array]], memory: Allocate | None = None
) -> list[UserState]:
    """States that are in GPU memory under marks of their own, and in memory of a kind on the host."""
    made = executor.encode_all(histories, arrays_for(executor, histories, memory))
    marks = [next(MARKS).to_bytes(8, "little") for _ in histories]
    executor.keep_all(marks)
    lengths = [tuple(history["history_length"][0].tolist()) for history in histories]
    return [UserState(*one) for one in zip(made, lengths, marks, strict=True)]


def in_flight(place: Place, artifact: Artifact, workload: Workload) -> dict[str, Any]:
    """Calls of a few users a second: k on the same streams, executors with streams of their own, one without graphs.
    `h2d_share` is the share of the transfers' time that is hidden behind computing with so many under way."""
    from rankd.engine.cuda.calls_in_flight import rate
    from rankd.engine.cuda.cuda_backend import open_pool
    from rankd.engine.cuda.cuda_device import Way
    from rankd.engine.cuda.cuda_executor import CudaExecutor

    class Launched(device_class(place)):  # type: ignore[misc]
        """Without graphs."""

        def captured(self, work: Callable[[], None], way: Way = Way.COMPUTE) -> Callable[[], None]:
            """Every kernel that computes is launched by itself."""
            replay: Callable[[], None] = super().captured(work, way)
            return replay if way is not Way.COMPUTE or place.rehearses else work

    users = place.flight_users
    histories, candidates = inputs_of(artifact, workload, users)
    backends = [backend_of(place, artifact, 1, MOST_IN_FLIGHT), backend_of(place, artifact, MOST_IN_FLIGHT, 1)]
    shared, apart = ([backend.executor() for _ in range(MOST_IN_FLIGHT)] for backend in backends)
    launched_on, model = Launched(), gpu_model(place, artifact)
    pool = open_pool(model, launched_on, EngineConfig("cuda", Precision.BF16, gpu_state_mib=64), users)
    launched = CudaExecutor(model, pool, launched_on)

    def calls(executors: Sequence[CudaExecutor], found: bool, memory: Allocate | None = None) -> list[Call]:
        kept = marked_states(executors[0], histories, memory)
        states = kept if found else [UserState(state.arrays, state.lengths) for state in kept]
        made: list[Call] = [partial(executor.score, states, candidates) for executor in executors]
        for call in made:
            call()
        return made

    rates: dict[str, dict[int, float]] = {}
    ready: dict[str, list[Call]] = {}  # kept to the end: what was sent last is sent again by `parts_ms`
    for name, executors, there, memory in (
        ("k in flight, states found", shared, True, None),
        ("k in flight, states staged", shared, False, None),
        ("k in flight, states sent", shared, False, backends[0].host_memory),
        ("k executors, states found", apart, True, None),
    ):
        ready[name] = calls(executors, there, memory)
        rates[name] = {k: rate(ready[name][:k], place.rate_seconds) for k in range(1, MOST_IN_FLIGHT + 1)}
    plain = rate(calls([launched], True), place.rate_seconds)
    spent = parts_ms(place, shared[0], users)
    found, sent, staged = (rates[f"k in flight, states {how}"] for how in ("found", "sent", "staged"))

    def hidden(k_rates: dict[int, float], transfers: float) -> float:
        exposed = 1e3 / max(k_rates.values()) - spent["compute"]
        return min(max(1.0 - exposed / transfers, 0.0), 1.0)

    return {
        "calls_a_second": rates | {"one executor without graphs": plain},
        "device_ms": spent,
        "dso_gain": max(rates["k executors, states found"].values()) / plain,
        "in_flight_gain": max(found.values()) / found[1],
        "in_flight_gain_sent": max(sent.values()) / sent[1],
        "h2d_share": hidden(found, spent["in"] + spent["out"]),
        "pinned_gain": max(sent.values()) / max(staged.values()),
        "h2d_share_sent": hidden(sent, spent["in"] + spent["out"] + spent["states in"]),
    }


def parts_ms(place: Place, executor: Any, users: int) -> dict[str, float]:
    """What the GPU spends on each part of the call that the executor ran last: copies, and all kernels."""
    from rankd.engine.cuda.kernels.triton_host_states import fetch_pages

    prepared, arriving = list(executor._scoring.values())[-1], executor._arriving  # of the start's is the first
    last, shape = arriving._fetched._turns[arriving._fetched._next - 1].staging.there, executor._shape
    states = executor._pool.states(last["count"])

    def copied(staging: Any) -> float:
        return device_ms(place, lambda: staging._block.copy_(staging._pinned, non_blocking=True))

    return {
        "compute": device_ms(place, prepared.launch),
        "in": copied(prepared.staging),
        "out": device_ms(place, lambda: prepared.result.copy_(prepared.made, non_blocking=True)),
        "states in": device_ms(
            place, lambda: fetch_pages(states, last["rows"], last["count"], shape.heads, shape.dtype)
        ),
        "states in, staged": users * copied(arriving._turns[0].staging),
    }


def inputs_of(artifact: Artifact, workload: Workload, users: int) -> tuple[list[dict[str, Array]], dict[str, Array]]:
    """Random full histories of `users` users, each B = 1, and their candidates together."""
    random, manifest = np.random.default_rng(workload.seed), artifact.manifest
    tokens, count = manifest.schema.history_buckets[-1], manifest.schema.candidate_buckets[-1]
    histories = []
    for _ in range(users):
        history = {spec.name: drawn(spec, random, {"B": 1, "T": tokens}) for spec in manifest.history_inputs}
        history["history_time"] = np.sort(random.integers(0, 10**7, history["history_time"].shape, np.int32))
        history["history_event"] %= len(manifest.schema.event_types)
        history["history_length"][...] = tokens
        histories.append(history)
    candidates = {spec.name: drawn(spec, random, {"B": users, "C": count}) for spec in manifest.candidate_inputs}
    candidates["context_time"][...] = 2 * 10**7
    return histories, candidates


def drawn(spec: TensorSpec, random: np.random.Generator, sizes: dict[str, int]) -> Array:
    """Random numbers for one input; ids are small, for tables of every size."""
    shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
    if spec.dtype == "float32":
        return random.standard_normal(shape).astype(np.float32)
    return random.integers(0, 3, shape).astype(spec.dtype)


def attention_alone(place: Place, workload: Workload, peak: float | None) -> dict[str, Any]:
    """The attention kernels by themselves, as many users as there are, by device events, for each storage of pages."""
    import torch

    from rankd.engine.cuda.kernels.triton_attention_steps import Weighting
    from rankd.engine.cuda.kernels.triton_candidate_attention import CandidateRows, attend_candidates
    from rankd.engine.cuda.kernels.triton_history_attention import HistoryRows, attend_history
    from rankd.engine.cuda.paged_states import PageType

    if not place.rehearses:
        sys.path.insert(0, str(ROOT))
        os.environ["RANKD_TEST_GPU"] = "1"
    from tests.engine.cuda.plain_attention import PAGE, Sizes, states_of, tables_of
    from tests.engine.cuda.test_attention_kernels import padded, tiles_over

    users, tokens, count = place.users[-1], workload.block_tokens, workload.buckets.candidates[-1]
    model, made = workload.model, {}
    weighting = Weighting.SOFTMAX if model.kind is ModelKind.CLIMBER else Weighting.POINTWISE
    sizes = Sizes(model.blocks, 1, model.heads, model.width // model.heads, tokens + 1)
    with torch.device(place.name):
        lengths, now = torch.full((users, model.blocks), tokens, dtype=torch.int32), torch.full((users,), 10**7)
        for kind in (PageType.BF16, PageType.FP8):
            dtype = torch.bfloat16
            states, tables = states_of(sizes, lengths, kind), tables_of(sizes, weighting)
            cells: Sequence[tuple[str, int, float]] = (
                ("history", tokens, users * model.blocks * tokens * (tokens + 1) / 2 * 4 * model.width),
                ("candidates", count, users * model.blocks * count * (tokens + 1) * 4 * model.width),
            )
            for name, rows, flops in cells:
                qkv = torch.randn(model.blocks, users * rows, 3 * model.width, dtype=dtype)
                out = torch.empty(model.blocks, users * rows, model.width, dtype=dtype)
                tiles = padded([tiles_over([rows] * users)] * model.blocks)
                if name == "history":
                    times = torch.zeros(model.blocks, users * rows, dtype=torch.int32)
                    told = HistoryRows(tiles, torch.zeros_like(lengths), times, PAGE)
                    spent = device_ms(place, partial(attend_history, out, qkv, told, states, tables, 0))
                else:
                    who = CandidateRows(tiles[0].contiguous(), lengths, now.int(), PAGE)
                    spent = device_ms(place, partial(attend_candidates, out, qkv, who, states, tables, 0))
                share = flops / spent / 1e9 / peak if peak else None
                made[f"{name} {kind.value}"] = {"ms": spent, "peak_share": share}
    return made


def scheduled(place: Place, name: str) -> Any:
    """Uneven requests through the schedule in made-up time, with what calls take on this GPU, beside fixed shapes. In a
    process of its own whose kernels are not tuned: dozens of buckets would take minutes each."""
    target, workload = ("openvino", "small") if place.rehearses else ("cuda", name)
    command = [sys.executable, "-m", "rankd", "bench", "schedule", "--simulate", "--json", "--seconds", "3"]
    command += ["--workload", workload, "--target", target]
    environment = os.environ | {"RANKD_CUDA_TUNE": "off"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)  # noqa: S603 - our own interpreter
    if done.returncode != 0:
        raise AssertionError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])["ratios"]


if __name__ == "__main__":
    sys.exit(main())
