"""States that are not in GPU memory yet come from the host, into pages of the pool.

In: states' arrays and the pages that they get. Out: nothing; what is launched afterwards finds them there. What lies in
locked memory the GPU reads there (`fetched_states.py`). The rest goes through pinned blocks, a state at a time: two of
them take turns, so one state is written by the host while the one before it is on its way. What arrives is put into its
pages by a kernel, which narrows it to e4m3 where pages are of that type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rankd.engine.cuda.call_staging import CallStaging, Section
from rankd.engine.cuda.cuda_device import Device, Way
from rankd.engine.cuda.fetched_states import Arriving, FetchedStates
from rankd.engine.cuda.kernels.triton_state_rows import ArrivedPages, place_pages
from rankd.engine.cuda.paged_states import StateShape
from rankd.engine.cuda.pinned_memory import PinnedMemory
from rankd.engine.cuda.state_pool import PlacedState, StatePool
from rankd.types import Array

TURNS = 2


@dataclass(frozen=True, slots=True)
class _Turn:
    """A pinned block and its twin. `sent`: the transfer is over; `placed`: the twin was read."""

    staging: CallStaging
    launch: Callable[[], None]
    sent: Any
    placed: Any


class Arrivals:
    """One executor's way for states. Memory is taken when it is made, for a user's longest state twice. `memory` knows
    what is locked; None: nothing is."""

    def __init__(self, device: Device, pool: StatePool, memory: PinnedMemory | None = None) -> None:
        self._device, self._page = device, pool.shape.page
        self._fetched = None if memory is None else FetchedStates(device, pool, memory)
        self._turns = [self._turn(pool) for _ in range(TURNS)]
        self._next = 0

    def bring(self, states: Sequence[Arriving]) -> None:
        """Begin to bring the first `placed.lengths[n]` tokens of each block n of every state."""
        near, far = list[Arriving](), list[Arriving]()
        for one in states:
            (near if self._fetched is not None and self._fetched.reaches(*one) else far).append(one)
        if self._fetched is not None and near:
            self._fetched.fetch(near)
        for one in far:
            self.send(*one)

    def send(self, state: Mapping[str, Array], placed: PlacedState) -> None:
        """The same of one state, through a pinned block."""
        device, turn = self._device, self._turns[self._next]
        self._next = (self._next + 1) % TURNS
        device.wait(turn.sent)
        filled = self._write(turn.staging.host, state, placed)
        device.behind(Way.IN, turn.placed)
        turn.staging.send(filled)
        device.record(turn.sent, Way.IN)
        device.behind(Way.COMPUTE, turn.sent)
        turn.launch()
        device.record(turn.placed, Way.COMPUTE)

    def _write(self, host: Mapping[str, Array], state: Mapping[str, Array], placed: PlacedState) -> int:
        """Fill a block; how many pages hold something."""
        times, pages, filled = host["page_times"], host["pages"], 0
        for block, length in enumerate(placed.lengths):
            for number, start in enumerate(range(0, length, self._page)):
                end = min(start + self._page, length)
                host["places"][filled] = placed.pages[block][number]
                times[filled, : end - start] = state["times"][0, block, start:end]
                pages[filled, :, :, : end - start] = state["keys_values"][0, block, :, :, start:end]
                filled += 1
        host["count"][:] = filled
        return filled

    def _turn(self, pool: StatePool) -> _Turn:
        device, staging = self._device, CallStaging(self._device, arrival_sections(pool.shape))
        there, sent = staging.there, device.event()
        staging.send(0)
        device.record(sent, Way.IN)
        device.wait(sent)
        arrived = ArrivedPages(there["count"], there["places"], there["page_times"], there["pages"])
        launch = device.captured(partial(place_pages, pool.states(there["places"]), arrived, pool.shape.heads))
        return _Turn(staging, launch, sent, device.event())


def arrival_sections(shape: StateShape) -> list[Section]:
    """Of one user's state; the pages come last, so that only those travel that hold something."""
    most = shape.pages_a_user
    return [
        Section("count", (1,)),
        Section("places", (most,)),
        Section("page_times", (most, shape.page)),
        Section("pages", (most, shape.layers, 2, shape.page, shape.width), shape.dtype),
    ]
