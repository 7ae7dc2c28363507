"""A `Device` of CPU tensors, on which kernels run in Triton's interpreter; it counts, and its memory may end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

from rankd.engine.cuda.cuda_device import out_of_memory
from rankd.errors import EngineFailure


class InterpretedDevice:
    """`counts` are how often memory was taken, something sent or fetched, recorded, launched, waited for."""

    def __init__(self, memory_bytes: int = 1 << 40, measures: bool = False) -> None:
        self.counts = dict.fromkeys(("taken", "transfers", "recorded", "launched", "waits"), 0)
        self.memory_bytes, self.measures = memory_bytes, measures

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory that is garbage until it is written."""
        self._take(prod(shape) * dtype.itemsize)
        if dtype is torch.uint8:
            return torch.full(tuple(shape), 0x7F, dtype=dtype)  # huge as float32 and as bfloat16
        return torch.full(tuple(shape), 1e30, dtype=dtype)

    def pinned(self, num_bytes: int) -> Tensor:
        """Memory of the host."""
        self.counts["taken"] += 1
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def transfer(self, target: Tensor, source: Tensor) -> None:
        """A copy, at once."""
        self.counts["transfers"] += 1
        target.copy_(source)

    def captured(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run it once; what is returned runs it again."""
        self.counts["recorded"] += 1
        work()

        def replay() -> None:
            self.counts["launched"] += 1
            work()

        return replay

    @contextmanager
    def running(self) -> Iterator[None]:
        """As CudaStream has it."""
        try:
            yield
        except MemoryError as error:
            raise out_of_memory(error) from error
        except RuntimeError as error:
            raise EngineFailure(f"the GPU failed: {error}") from error

    def wait(self) -> None:
        """Nothing is under way."""
        self.counts["waits"] += 1

    def _take(self, num_bytes: int) -> None:
        self.counts["taken"] += 1
        self.memory_bytes -= num_bytes
        if self.memory_bytes < 0:
            raise MemoryError(f"tried to take {num_bytes} bytes")
