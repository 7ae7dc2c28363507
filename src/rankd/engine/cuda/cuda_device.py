"""The seam between executors and a GPU: memory, streams, transfers, captured work. Tests fill it with CPU tensors.

Everything an executor does goes through its `Device`, so that a test can count allocations and transfers, make them
fail, and run them in the worst order that is allowed. Next: `call_staging.py` and `cuda_executor.py` use it.

There are three ways, each a stream: IN and OUT copy while COMPUTE computes. On a way things happen in their order; what
needs something of another way is put `behind` an event that was recorded there. So the calls of executors that share a
device overlap: the next one is sent while one is computed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor
from triton.errors import TritonError

from rankd.engine.cuda.locked_pages import locked_pages
from rankd.errors import EngineFailure

_RECORDING = threading.Lock()
"""While a graph is recorded nobody may wait for the whole GPU, as whoever records or measures next does."""
EXACT_FROM = 64 << 20
"""Bytes of pinned memory above which no more is locked than was asked for (`locked_pages.py`)."""


class Way(Enum):
    """Copies to the GPU, launches, copies back. Kernels that read or write the host's memory copy, too."""

    IN = "in"
    COMPUTE = "compute"
    OUT = "out"


class Device(Protocol):
    """Three streams of a GPU and the memory that is taken through them; for any number of threads.

    `measures`: whether kernels choose their block sizes by measuring, so that a first run has to be a full one.
    """

    measures: bool

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the GPU."""
        ...

    def pinned(self, num_bytes: int) -> Tensor:
        """Memory of the host that transfers read and write directly, and kernels at its own addresses: (num_bytes,)
        uint8 of zeros.

        Raises:
            RuntimeError: so much of it cannot be had.
        """
        ...

    def free_bytes(self) -> int:
        """GPU memory that nobody has."""
        ...

    def transfer(self, way: Way, target: Tensor, source: Tensor) -> None:
        """Copy between pinned and GPU memory when the way gets there; the caller goes on."""
        ...

    def event(self) -> Any:
        """A moment on a way; until it is recorded it has always been."""
        ...

    def record(self, event: Any, way: Way) -> None:
        """The event is when the way has done what it was given so far."""
        ...

    def behind(self, way: Way, event: Any) -> None:
        """What the way is given from now on happens after the event."""
        ...

    def wait(self, event: Any) -> None:
        """The caller waits until the event."""
        ...

    def captured(self, work: Callable[[], None], way: Way = Way.COMPUTE) -> Callable[[], None]:
        """Run `work` once and wait for it, then record it; what is returned runs it again on the same memory, as one
        launch on a way. What `work` reads has to be there."""
        ...

    def running(self) -> AbstractContextManager[None]:
        """What is launched inside goes to COMPUTE.

        Raises:
            EngineFailure: the GPU has no memory left, or failed.
        """
        ...


class CudaStreams:
    """Streams of one GPU, as a `Device`."""

    measures = True

    def __init__(self, index: int = 0) -> None:
        self._device = torch.device("cuda", index)
        self._streams: dict[Way, Any] = {way: torch.cuda.Stream(self._device) for way in Way}
        # One that others launch on would record that: torch hands its 32 streams of a priority out again and again.
        self._recording: Any = torch.cuda.Stream(self._device, priority=-1)
        self._scratch = torch.cuda.graph_pool_handle()  # graphs of one stream run one after the other and keep nothing

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the GPU, zeros: what is never written is finite."""
        made = torch.zeros(tuple(shape), dtype=dtype, device=self._device)
        torch.cuda.current_stream(self._device).synchronize()  # other streams write there next
        return made

    def pinned(self, num_bytes: int) -> Tensor:
        """Pinned memory, zeros: torch's, which is taken again quickly, or exactly as much."""
        if num_bytes > EXACT_FROM:
            torch.cuda.current_stream(self._device).synchronize()  # gives this thread its context
            return locked_pages(num_bytes)
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)

    def free_bytes(self) -> int:
        """As the driver has it."""
        return int(torch.cuda.mem_get_info(self._device)[0])

    def transfer(self, way: Way, target: Tensor, source: Tensor) -> None:
        """An asynchronous copy on a stream."""
        with torch.cuda.stream(self._streams[way]):
            target.copy_(source, non_blocking=True)

    def event(self) -> Any:
        """One that is waited for as quickly as can be."""
        return torch.cuda.Event()

    def record(self, event: Any, way: Way) -> None:
        """On the way's stream."""
        event.record(self._streams[way])

    def behind(self, way: Way, event: Any) -> None:
        """The stream waits; nobody else does."""
        self._streams[way].wait_event(event)

    def wait(self, event: Any) -> None:
        """The calling thread waits, without the interpreter."""
        event.synchronize()

    def captured(self, work: Callable[[], None], way: Way = Way.COMPUTE) -> Callable[[], None]:
        """A CUDA graph. The run before it compiles and tunes kernels, which cannot happen while it is recorded.

        A graph has addresses and keeps no memory: what is returned has `work`, and with it the tensors. The library's
        workspace is of a stream, and goes when any graph of it does; so each graph gets one of `_scratch`.
        """
        with _RECORDING:
            with torch.cuda.stream(self._recording):
                work()
            self._recording.synchronize()
            torch._C._cuda_clearCublasWorkspaces()
            graph = torch.cuda.CUDAGraph()
            # thread_local: other executors go on launching meanwhile.
            with torch.cuda.graph(graph, self._scratch, self._recording, capture_error_mode="thread_local"):
                work()
            torch._C._cuda_clearCublasWorkspaces()  # nobody else gets this graph's

        def replay(keep: object = work) -> None:
            with torch.cuda.stream(self._streams[way]):
                graph.replay()

        return replay

    @contextmanager
    def running(self) -> Iterator[None]:
        """COMPUTE is the current stream; torch's errors become ours."""
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._streams[Way.COMPUTE]):
                yield
        except torch.cuda.OutOfMemoryError as error:
            raise out_of_memory(error) from error
        except (RuntimeError, TritonError) as error:
            raise EngineFailure(f"the GPU failed: {error}") from error


def out_of_memory(error: BaseException) -> EngineFailure:
    """What a request is told when the GPU has no memory left for its shape."""
    return EngineFailure(
        f"the GPU has no memory left for a call of this shape: {error}; fewer executors (engine.executors), a smaller "
        "engine.gpu_state_mib, shorter candidate buckets or fewer models on this GPU leave more"
    )
