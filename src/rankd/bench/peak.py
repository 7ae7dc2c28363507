"""What a processor or a GPU can do at most, measured: the yardstick beside which a model's operations stand."""

from __future__ import annotations

import time

import numpy as np

HINTS = {"fp32": "f32", "bf16": "bf16"}
SIZE = 1024
GPU_SIZE, GPU_CALLS = 8192, 5
TRIALS = 20


def peak_gflops(precision: str, threads: int = 1) -> float:
    """Billions of operations a second of so many threads: the engine's own matrix product, 1024 x 1024, best of 20."""
    import openvino as ov
    from openvino import opset13

    left = opset13.parameter([SIZE, SIZE], np.float32)
    weight = opset13.constant(np.random.default_rng(0).standard_normal((SIZE, SIZE)).astype(np.float32))
    graph = ov.Model([opset13.matmul(left, weight, False, False)], [left])
    options = {
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(threads),
    }
    request = ov.Core().compile_model(graph, "CPU", options).create_infer_request()
    request.set_input_tensor(0, ov.Tensor(np.ones((SIZE, SIZE), np.float32)))
    best = float("inf")
    for _ in range(TRIALS):
        started = time.perf_counter()
        request.infer()
        best = min(best, time.perf_counter() - started)
    return 2.0 * SIZE**3 / best / 1e9


def gpu_peak_gflops(precision: str, device: str = "cuda", size: int = GPU_SIZE) -> float:
    """Billions of operations a second of torch's matrix product, 8192 x 8192 on a GPU: GPU_CALLS in a row, best of 20
    such rows. Float32 is not rounded to tf32."""
    import torch

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    made, best = torch.empty_like(left), float("inf")

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(TRIALS):
        wait()
        started = time.perf_counter()
        for _ in range(GPU_CALLS):
            torch.mm(left, right, out=made)
        wait()
        best = min(best, (time.perf_counter() - started) / GPU_CALLS)
    return 2.0 * size**3 / best / 1e9
