"""What the processor can do at most, measured: the yardstick beside which a model's operations stand."""

from __future__ import annotations

import time

import numpy as np

HINTS = {"fp32": "f32", "bf16": "bf16"}
SIZE = 1024
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
