"""PyTriton: NVIDIA's Triton in front, Python functions behind it, dynamic batching. `python -m ...pytriton_server`.

A request is one element of type BYTES, so that requests of different lengths share a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from rankd.bench.peers.peer_plan import PeerPlan, read_plan
from rankd.bench.peers.peer_process import PYTRITON_MODEL
from rankd.bench.peers.peer_worker import PeerWorker


def inference(plan: PeerPlan) -> Callable[..., Any]:
    """A function with an executor of its own."""
    worker = PeerWorker(plan)

    @batch
    def infer(request: Any) -> dict[str, Any]:
        answers = worker.answer(request[:, 0].tolist())
        return {"scores": np.array([[answer] for answer in answers], dtype=object)}

    answering: Callable[..., Any] = infer
    return answering


def main() -> None:
    """Serve until SIGTERM."""
    plan = read_plan()
    config = TritonConfig(
        http_address=plan.host, http_port=plan.port, grpc_address=plan.host, allow_grpc=False, allow_metrics=False
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name=PYTRITON_MODEL,
            infer_func=[inference(plan) for _ in range(plan.workers)],
            inputs=[Tensor(name="request", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="scores", dtype=bytes, shape=(1,))],
            config=ModelConfig(
                max_batch_size=plan.batch, batcher=DynamicBatcher(max_queue_delay_microseconds=plan.wait_ms * 1000)
            ),
            strict=False,
        )
        triton.serve()


if __name__ == "__main__":
    main()
