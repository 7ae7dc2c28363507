"""What runs inside a contestant's process of the suite `engine`: load, give the scores, time n calls.

python -m rankd.bench.engine_suite.contestants < Load, Score, Time > Loaded, Scored, Timed, Refused

Next: `contestant_process.py` is the other end of the pipes.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from rankd.artifact import Artifact
from rankd.bench.engine_suite.contestant_calls import Calls, arrays_of, export_dense, ort_calls_on, same_shapes
from rankd.bench.engine_suite.contestant_messages import (
    GPU,
    LENGTH_BYTES,
    Command,
    Family,
    Load,
    Loaded,
    Refused,
    Reply,
    Score,
    Scored,
    Time,
    Timed,
    Work,
    pack,
    unpack_features,
    write_frame,
)
from rankd.bench.engine_suite.own_contestant import rankd_calls
from rankd.engine.backend import Precision
from rankd.errors import EngineFailure
from rankd.types import Features, Float32Array


def load_calls(load: Load) -> dict[Work, Calls]:
    """What the family can do, ready to run.

    Raises:
        EngineFailure, ImportError, RuntimeError: it cannot run on this machine.
    """
    requests = [unpack_features(inputs) for inputs in load.requests]
    if load.target == GPU and load.family is not Family.RANKD:
        from rankd.bench.engine_suite.gpu_contestants import gpu_calls

        return gpu_calls(load, requests)
    return MAKERS[load.family](load, requests)


def eager_calls(load: Load, requests: Sequence[Features]) -> dict[Work, Calls]:
    """Torch as it comes, one dense mask.

    bf16 is autocast over float32 weights: on an EPYC of Zen 4 it took 65 ms where `model.bfloat16()` took 72 ms
    (workload `base`, one thread), so the better of the two is the contestant.
    """
    import torch

    from rankd.bench.engine_suite.dense_model import dense_form
    from rankd.bench.parity import torch_inputs, torch_model

    torch.set_num_threads(load.threads)
    model = dense_form(torch_model(Artifact.open(Path(load.artifact)))).eval()
    inputs = [torch_inputs(features) for features in requests]
    narrow = load.precision is Precision.BF16

    def call(i: int) -> Float32Array:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            logits: Float32Array = model(*inputs[i])[:, : requests[i].num_candidates].float().numpy()
        return logits

    return {Work.COLD: Calls(call, call)}


def compile_calls(load: Load, requests: Sequence[Features]) -> dict[Work, Calls]:
    """torch.compile of encode and score in one graph, weights and arithmetic in bfloat16, constants frozen."""
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise EngineFailure("no C++ compiler; torch.compile needs one")
    import torch

    from rankd.bench.parity import torch_inputs, torch_model
    from rankd.models.protocol import logits_of

    torch.set_num_threads(load.threads)
    model = torch_model(Artifact.open(Path(load.artifact))).bfloat16()
    torch.set_default_dtype(torch.bfloat16)  # the masks that the model makes follow it
    inputs = [
        tuple({n: t.bfloat16() if t.is_floating_point() else t for n, t in side.items()} for side in torch_inputs(one))
        for one in requests
    ]
    compiled = torch.compile(lambda history, candidates: logits_of(model, history, candidates))

    def call(i: int) -> Float32Array:
        with torch.no_grad():  # in inference mode constants are not frozen
            logits: Float32Array = compiled(*inputs[i])[:, : requests[i].num_candidates].float().numpy()
        return logits

    for i in range(len(requests)):
        call(i)
    return {Work.COLD: Calls(call, call)}


def ort_calls(load: Load, requests: Sequence[Features]) -> dict[Work, Calls]:
    """ONNX Runtime on the dense export."""
    return ort_calls_on(load, requests, export_dense(load, "onnxruntime"), ["CPUExecutionProvider"])


def openvino_calls(load: Load, requests: Sequence[Features]) -> dict[Work, Calls]:
    """OpenVINO on the dense export, set for latency."""
    import openvino as ov

    core = ov.Core()
    graph = core.read_model(export_dense(load, "openvino") / "score.xml")
    names = [port.get_node().get_friendly_name() for port in graph.inputs]
    if same_shapes(requests):
        arrays = arrays_of(requests[0])
        graph.reshape({port: list(arrays[n].shape) for port, n in zip(graph.inputs, names, strict=True)})
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {Precision.FP32: "f32", Precision.BF16: "bf16"}[load.precision],
        "INFERENCE_NUM_THREADS": str(load.threads),
        "NUM_STREAMS": "1",
        "ENABLE_CPU_PINNING": "NO",
    }
    request = core.compile_model(graph, "CPU", options).create_infer_request()
    inputs = [[ov.Tensor(arrays_of(one)[name], shared_memory=True) for name in names] for one in requests]

    def call(i: int) -> Float32Array:
        for index, tensor in enumerate(inputs[i]):
            request.set_input_tensor(index, tensor)
        request.infer()
        logits: Float32Array = request.get_output_tensor(0).data[:, : requests[i].num_candidates].copy()
        return logits

    return {Work.COLD: Calls(call, call)}


MAKERS: Mapping[Family, Callable[[Load, Sequence[Features]], dict[Work, Calls]]] = {
    Family.EAGER: eager_calls,
    Family.COMPILE: compile_calls,
    Family.ORT: ort_calls,
    Family.OPENVINO: openvino_calls,
    Family.RANKD: rankd_calls,
}


def time_calls(call: Callable[[int], object], num_requests: int, count: int) -> list[float]:
    """Milliseconds of each of `count` calls over the requests in turn, after one that does not count."""
    call(num_requests - 1)
    gc.collect()
    gc.disable()
    spent = []
    for number in range(count):
        started = time.perf_counter()
        call(number % num_requests)
        spent.append((time.perf_counter() - started) * 1e3)
    gc.enable()
    return spent


class Stage:
    """The process's state between commands."""

    def __init__(self) -> None:
        self._calls: dict[Work, Calls] = {}
        self._num_requests = 0

    def obey(self, command: Command) -> Reply:
        """Do what is asked."""
        match command:
            case Load(requests=requests):
                started = time.perf_counter()
                self._calls, self._num_requests = load_calls(command), len(requests)
                return Loaded(time.perf_counter() - started)
            case Score(work):
                return Scored([pack(self._calls[work].logits(i)) for i in range(self._num_requests)])
            case Time(work, calls):
                return Timed(time_calls(self._calls[work].call, self._num_requests, calls))


def main() -> None:
    """Commands from standard input, replies to what was standard output; whatever else prints goes to stderr."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    commands, stage = sys.stdin.buffer, Stage()
    decoder: Any = msgspec.msgpack.Decoder(Command)
    while header := commands.read(LENGTH_BYTES):
        command = decoder.decode(commands.read(int.from_bytes(header, "little")))
        try:
            reply = stage.obey(command)
        except Exception as error:  # noqa: BLE001  the process's edge: the reason goes to the report
            reply = Refused(f"{type(error).__name__}: {error}")
        write_frame(replies, reply)


if __name__ == "__main__":
    main()
