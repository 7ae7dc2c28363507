"""States that the GPU reads from the host's memory by itself: their pages need no copy by the host, only a table.

In: states whose arrays lie in memory that `pinned_memory.py` has locked, and their pages. Out: nothing; what is
computed afterwards finds them there. A row of the table is a page: where its tokens and times begin on the host, how
far layers lie apart in bytes, how many tokens it has, and which page of the pool it becomes. Worked example, a room of
T = 100 tokens in bfloat16, A = 24 wide, S = 64 tokens a page, 70 of them there, in pages 7 and 2:

    keys_values at   times at    apart    tokens   page
    k                t           4800     64       7
    k + 3072         t + 256     4800     6        2

All states of a call are one table, one transfer and one launch on IN, unless there are very many. The pages that a
call gets nobody reads any more (`state_pool.py`), and on IN things happen in their order, so the launch waits for
nothing: it overlaps with what the calls before compute. `kernels/triton_host_states.py` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from rankd.engine.cuda.call_staging import CallStaging, Section
from rankd.engine.cuda.cuda_device import Device, Way
from rankd.engine.cuda.kernels.triton_host_states import ROW, fetch_pages
from rankd.engine.cuda.paged_states import pages_of
from rankd.engine.cuda.pinned_memory import PinnedMemory, address_of
from rankd.engine.cuda.state_pool import PlacedState, StatePool
from rankd.types import Array, Int64Array

TURNS = 2
USERS_AT_ONCE = 8
"""For so many users' longest states a table has rows."""
Arriving = tuple[Mapping[str, Array], PlacedState]
"""A state's arrays and where it goes."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """A table. `sent`: the host may write the next one over it."""

    staging: CallStaging
    launch: Callable[[], None]
    sent: Any


class FetchedStates:
    """One executor's tables."""

    def __init__(self, device: Device, pool: StatePool, memory: PinnedMemory) -> None:
        self._device, self._shape, self._memory = device, pool.shape, memory
        self._most = USERS_AT_ONCE * pool.shape.pages_a_user
        self._turns = [self._turn(pool) for _ in range(TURNS)]
        self._next, self._there = 0, device.event()

    def reaches(self, state: Mapping[str, Array], placed: PlacedState) -> bool:
        """Whether the GPU can read what is needed of a state where it lies."""
        numbers, times = state["keys_values"], state["times"]
        room = min(numbers.shape[4], times.shape[2])
        return max(placed.lengths) <= room and self._memory.holds(numbers) and self._memory.holds(times)

    def fetch(self, states: Sequence[Arriving]) -> None:
        """Begin to bring the first `placed.lengths[n]` tokens of each block n of every state."""
        device, rows = self._device, np.concatenate([self._rows(*one) for one in states])
        for start in range(0, len(rows), self._most):
            turn, some = self._turns[self._next], rows[start : start + self._most]
            self._next = (self._next + 1) % TURNS
            device.wait(turn.sent)
            turn.staging.host["count"][:] = len(some)
            turn.staging.host["rows"][: len(some)] = some
            turn.staging.send(len(some))
            device.record(turn.sent, Way.IN)
            turn.launch()
        device.record(self._there, Way.IN)
        device.behind(Way.COMPUTE, self._there)

    def _rows(self, state: Mapping[str, Array], placed: PlacedState) -> Int64Array:
        """The pages (M, ROW) of a state; see above."""
        page, numbers, times = self._shape.page, state["keys_values"], state["times"]
        made = []
        for block, length in enumerate(placed.lengths):
            number = np.arange(pages_of(length, page))
            rows = np.empty((len(number), ROW), np.int64)
            rows[:, 0] = address_of(numbers) + block * numbers.strides[1] + number * page * numbers.strides[4]
            rows[:, 1] = address_of(times) + block * times.strides[1] + number * page * times.strides[2]
            rows[:, 2] = numbers.strides[3]
            rows[:, 3] = np.minimum(length - number * page, page)
            rows[:, 4] = placed.pages[block][: len(number)]
            made.append(rows)
        return np.concatenate(made)

    def _turn(self, pool: StatePool) -> _Turn:
        device, sent = self._device, self._device.event()
        staging = CallStaging(device, [Section("count", (1,)), Section("rows", (self._most, ROW), torch.int64)])
        staging.send(0)
        device.record(sent, Way.IN)
        device.wait(sent)
        there = staging.there
        states, shape = pool.states(there["count"]), pool.shape  # no table: pages are named by their rows
        work = partial(fetch_pages, states, there["rows"], there["count"], shape.heads, shape.dtype)
        return _Turn(staging, device.captured(work, Way.IN), sent)
