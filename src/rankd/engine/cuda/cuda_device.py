"""The seam between the executor and a GPU: memory, a stream, transfers, captured work. Tests fill it with CPU tensors.

Everything an executor does goes through its `Device`, so that a test can count allocations and transfers, and make them
fail. Next: `call_staging.py` and `cuda_executor.py` use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from triton.errors import TritonError

from rankd.errors import EngineFailure


class Device(Protocol):
    """One stream of a GPU and the memory that is taken through it.

    `measures`: whether kernels choose their block sizes by measuring, so that a first run has to be a full one.
    """

    measures: bool

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the GPU."""
        ...

    def pinned(self, num_bytes: int) -> Tensor:
        """Memory of the host that transfers read and write directly, (num_bytes,) uint8."""
        ...

    def transfer(self, target: Tensor, source: Tensor) -> None:
        """Copy between pinned and GPU memory when the stream gets there; the caller goes on."""
        ...

    def captured(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work` once, then record it; what is returned runs it again on the same memory, as one launch."""
        ...

    def running(self) -> AbstractContextManager[None]:
        """What is launched inside goes to this stream.

        Raises:
            EngineFailure: the GPU has no memory left, or failed.
        """
        ...

    def wait(self) -> None:
        """Until the stream has done everything."""
        ...


class CudaStream:
    """A stream of one GPU, as a `Device`."""

    measures = True

    def __init__(self, index: int = 0) -> None:
        self._device = torch.device("cuda", index)
        self._stream: Any = torch.cuda.Stream(self._device)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the GPU, zeros: what is never written is finite."""
        return torch.zeros(tuple(shape), dtype=dtype, device=self._device)

    def pinned(self, num_bytes: int) -> Tensor:
        """Pinned memory, zeros."""
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)

    def transfer(self, target: Tensor, source: Tensor) -> None:
        """An asynchronous copy on the stream."""
        target.copy_(source, non_blocking=True)

    def captured(self, work: Callable[[], None]) -> Callable[[], None]:
        """A CUDA graph. The run before it compiles and tunes kernels, which cannot happen while it is recorded."""
        work()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: other executors go on launching meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()
        replay: Callable[[], None] = graph.replay
        return replay

    @contextmanager
    def running(self) -> Iterator[None]:
        """The stream is the current one; torch's errors become ours."""
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                yield
        except torch.cuda.OutOfMemoryError as error:
            raise out_of_memory(error) from error
        except (RuntimeError, TritonError) as error:
            raise EngineFailure(f"the GPU failed: {error}") from error

    def wait(self) -> None:
        """Until the stream is empty."""
        self._stream.synchronize()


def out_of_memory(error: BaseException) -> EngineFailure:
    """What a request is told when the GPU has no memory left for its shape."""
    return EngineFailure(
        f"the GPU has no memory left for a call of this shape: {error}; fewer executors (engine.executors), shorter "
        "candidate buckets or fewer models on this GPU leave more"
    )
