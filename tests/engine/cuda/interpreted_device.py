"""A `Device` of CPU tensors, on which kernels run in Triton's interpreter; it counts, and its memory may end.

Nothing happens before somebody has to wait for it, and then only what that needs: a call that forgets to put one way
behind another reads what is not there yet. Of an `eager` way everything happens as soon as it may: what forgets that
others still read a block overwrites it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

from rankd.engine.cuda.cuda_device import Way, out_of_memory
from rankd.errors import EngineFailure

INTERPRETER = threading.RLock()
"""Triton's interpreter computes for one thread at a time."""


class Event:
    """How often it was recorded, how often it has happened."""

    def __init__(self) -> None:
        self.recorded = self.happened = 0
        self.way = Way.COMPUTE


class InterpretedDevice:
    """`counts` are how often memory was taken, something sent or fetched, recorded, launched, waited for; `done` is
    what has happened, in its order."""

    def __init__(
        self, memory_bytes: int = 1 << 40, measures: bool = False, eager: Way | None = None, lockable: int = 1 << 40
    ) -> None:
        self.counts = dict.fromkeys(("taken", "transfers", "recorded", "launched", "waits"), 0)
        self.memory_bytes, self.measures, self._eager = memory_bytes, measures, eager
        self.lockable = lockable
        self.done: list[str] = []
        self._ways: dict[Way, deque[Callable[[], object]]] = {way: deque() for way in Way}
        self._lock = INTERPRETER

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the GPU: garbage until it is written, or zeros where what is measured would be garbage too."""
        self._take(prod(shape) * dtype.itemsize)
        if self.measures:
            return torch.zeros(tuple(shape), dtype=dtype)
        huge = {
            torch.uint8: 0x7F,
            torch.int32: 0x7F7F7F7F,
            torch.float8_e4m3fn: 448.0,
        }  # 0x7F7F.. is huge as floats too
        return torch.full(tuple(shape), huge.get(dtype, 1e30), dtype=dtype)

    def pinned(self, num_bytes: int) -> Tensor:
        """Memory of the host, at most `lockable` bytes in one piece."""
        self.counts["taken"] += 1
        if num_bytes > self.lockable:
            raise RuntimeError(f"no {num_bytes} bytes can be locked")
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def free_bytes(self) -> int:
        """What is left."""
        return self.memory_bytes

    def transfer(self, way: Way, target: Tensor, source: Tensor) -> None:
        """A copy, later."""
        self.counts["transfers"] += 1
        self._give(way, lambda: target.copy_(source), f"{way.value} {target.nbytes}")

    def event(self) -> Event:
        """One that has always been."""
        return Event()

    def record(self, event: Event, way: Way) -> None:
        """It is when the way gets here."""
        with self._lock:
            event.recorded += 1
            event.way = way
            moment = event.recorded
            self._give(way, lambda: setattr(event, "happened", moment))

    def behind(self, way: Way, event: Event) -> None:
        """The way stops until the event."""
        with self._lock:
            moment, other = event.recorded, event.way

            def reached() -> None:
                while event.happened < moment:
                    self._step(other)

            self._ways[way].append(reached)

    def wait(self, event: Event) -> None:
        """Let happen what the event needs."""
        with self._lock:
            self.counts["waits"] += 1
            while event.happened < event.recorded:
                self._step(event.way)

    def captured(self, work: Callable[[], None], way: Way = Way.COMPUTE) -> Callable[[], None]:
        """Run it once; what is returned runs it again, when its turn comes."""
        self.counts["recorded"] += 1
        with self._lock:
            work()

        def replay() -> None:
            self.counts["launched"] += 1
            self._give(way, work, "compute" if way is Way.COMPUTE else f"{way.value} kernel")

        return replay

    @contextmanager
    def running(self) -> Iterator[None]:
        """As CudaStreams has it."""
        try:
            yield
        except MemoryError as error:
            raise out_of_memory(error) from error
        except RuntimeError as error:
            raise EngineFailure(f"the GPU failed: {error}") from error

    def _give(self, way: Way, work: Callable[[], object], name: str = "") -> None:
        def happen() -> None:
            work()
            self.done += [name] if name else []

        with self._lock:
            self._ways[way].append(happen)
            while way is self._eager and self._ways[way]:
                self._step(way)

    def _step(self, way: Way) -> None:
        """The next thing on a way, and whatever that needs first."""
        self._ways[way].popleft()()

    def _take(self, num_bytes: int) -> None:
        self.counts["taken"] += 1
        self.memory_bytes -= num_bytes
        if self.memory_bytes < 0:
            raise MemoryError(f"tried to take {num_bytes} bytes")
