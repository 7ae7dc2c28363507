"""Others on the GPU, all on the dense model: torch, torch compiled, its fused attentions, ONNX Runtime and TensorRT.

In: what `contestants.py` is asked to load. Out: calls. What a call reads goes to the GPU in the call and its logits
come back, as for our engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rankd.artifact import Artifact
from rankd.bench.engine_suite.contestant_calls import Calls, export_dense, ort_calls_on
from rankd.bench.engine_suite.contestant_messages import Family, Load, Work
from rankd.bench.engine_suite.dense_attention import Attention
from rankd.engine.backend import Precision
from rankd.errors import EngineFailure
from rankd.types import Features, Float32Array

ATTENTION = {
    Family.EAGER: (Attention.PLAIN, False),
    Family.COMPILE: (Attention.PLAIN, True),
    Family.SDPA: (Attention.SDPA, False),
    Family.FLEX: (Attention.FLEX, True),
}
"""How each of torch's families attends, and whether it is compiled."""
COMPILED = "max-autotune"
"""Of torch.compile: kernels chosen by measuring, launches in graphs."""
PROVIDERS = {Family.ORT: "CUDAExecutionProvider", Family.TENSORRT: "TensorrtExecutionProvider"}


def gpu_calls(load: Load, requests: Sequence[Features]) -> dict[Work, Calls]:
    """What the family can do, ready to run.

    Raises:
        EngineFailure, ImportError, RuntimeError: it cannot run on this machine.
    """
    if load.family in PROVIDERS:
        return _exported(load, requests, PROVIDERS[load.family])
    return torch_calls(load, requests, "cuda")


def torch_calls(load: Load, requests: Sequence[Features], device: str) -> dict[Work, Calls]:
    """The dense model in torch; in bf16 under autocast."""
    import torch

    from rankd.bench.engine_suite.dense_model import dense_form
    from rankd.bench.parity import torch_inputs, torch_model

    attention, compiled = ATTENTION[load.family]
    model = dense_form(torch_model(Artifact.open(Path(load.artifact))), attention).eval().to(device)
    run = torch.compile(model, mode=COMPILED) if compiled else model
    inputs = [torch_inputs(features) for features in requests]
    narrow = load.precision is Precision.BF16

    def call(i: int) -> Float32Array:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=narrow):
            sides = [{name: tensor.to(device) for name, tensor in side.items()} for side in inputs[i]]
            logits: Float32Array = run(*sides)[:, : requests[i].num_candidates].float().cpu().numpy()
        return logits

    for i in range(len(requests)):
        call(i)
    return {Work.COLD: Calls(call, call)}


def _exported(load: Load, requests: Sequence[Features], provider: str) -> dict[Work, Calls]:
    import onnxruntime  # type: ignore[import-untyped,unused-ignore]

    if provider not in onnxruntime.get_available_providers():
        raise EngineFailure(f"the onnxruntime that is installed has no {provider}; onnxruntime-gpu may have it")
    return ort_calls_on(load, requests, export_dense(load, "onnxruntime"), [provider])
