"""User states that stay in GPU memory: pages under a byte budget, which state lies in which, and which leave.

In: marks (`UserState.mark`) and lengths. Out: `PlacedState`s, held while a call reads or writes them. The host's cache
owns the truth: a state is found here only under the mark of its contents, so neither a stale nor a foreign one is ever.

    a call scores states         `hold`: those that are there, and pages for the others, which the call sends
    a call makes or grows them   `grow`: new pages; those of the state that grows are taken over, if nobody reads them
    it is over                   `release` or `settle`: what lies there now is found from now on
    the host says what it is     `name`

Pages only grow behind the tokens that somebody reads. Nothing is found before the call that wrote it is over, so no
stream has to wait for another one. A call takes all its pages at once or waits with none: nobody waits in a circle.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rankd.engine.cuda.cuda_device import Device
from rankd.engine.cuda.paged_states import PagedStates, PageType, StateShape, pages_of
from rankd.errors import EngineFailure
from rankd.observe.state_metrics import GpuCounts

WAIT_SECONDS = 10.0
"""For pages that other calls hold, which are milliseconds; longer only if one of them hangs."""
Lengths = tuple[int, ...]
Made = TypeVar("Made")


@dataclass(slots=True, eq=False)
class PlacedState:
    """A state in the pool: the first lengths[n] tokens of block n lie in pages[n], of a grown one the old ones.

    `there`: they do; else whoever has it writes them. `listed`: it can be found, under its mark if it has one.
    """

    lengths: Lengths
    pages: tuple[list[int], ...]
    mark: bytes = b""
    there: bool = False
    listed: bool = False
    readers: int = 1

    @property
    def key(self) -> bytes | PlacedState:
        """What it is listed under: one that was made and has no name yet is found by nobody, but may be evicted."""
        return self.mark or self


class StatePool:
    """`num_pages` pages, at least those of one user. Unless it `keeps`, states leave with the call that brought them.
    Thread-safe."""

    def __init__(self, device: Device, shape: StateShape, num_pages: int, keeps: bool = True) -> None:
        self.shape, self.num_pages, self._keeps = shape, num_pages, keeps
        of_a_page = shape.layers, 2, shape.page
        self._numbers = device.empty((num_pages, *of_a_page, shape.width), shape.kind.dtype)
        scaled = num_pages if shape.kind is PageType.FP8 else 0
        self._scales = device.empty((scaled, *of_a_page, shape.heads), torch.float32)
        self._times = device.empty((num_pages, shape.page), torch.int32)
        self._free = list(range(num_pages))
        self._listed: OrderedDict[bytes | PlacedState, PlacedState] = OrderedDict()  # the coldest first
        self._changed = threading.Condition()  # guards everything that changes
        self._found = self._sent = self._evicted = 0

    @property
    def most_users(self) -> int:
        """How many users' longest states fit at once."""
        return self.num_pages // self.shape.pages_a_user

    def states(self, table: Tensor) -> PagedStates:
        """The pages as kernels read them, through the table of a call."""
        return PagedStates(self._numbers, self._scales, self._times, table)

    def has(self, mark: bytes) -> bool:
        """Whether a state of this mark is there."""
        return mark in self._listed

    def hold(self, wanted: Sequence[tuple[bytes, Lengths]]) -> list[PlacedState]:
        """The states of these marks and lengths, for at most `most_users` users; one for all who ask for the same mark.

        Raises:
            EngineFailure: calls that hang have all pages.
        """
        return self._when_possible(lambda: self._hold(wanted))

    def grow(self, wanted: Sequence[tuple[bytes, Lengths, Lengths]]) -> list[PlacedState]:
        """States that grow from some lengths to others, each for this call alone. See `hold`."""
        return self._when_possible(lambda: self._grow(wanted))

    def release(self, held: Sequence[PlacedState], there: bool) -> None:
        """A call is over; `there`: it has brought what was not there, which is found from now on."""
        with self._changed:
            for placed in dict.fromkeys(held):
                placed.readers -= 1
                if there and not placed.there:
                    placed.there = True
                    self._sent += any(placed.lengths)
                    self._list(placed)
                self._give_if_unused(placed)
            self._changed.notify_all()

    def settle(self, made: Sequence[PlacedState], lengths: Sequence[Lengths]) -> None:
        """A call is over that has made states or let them grow: they are whole, and have no name yet."""
        with self._changed:
            for placed, whole in zip(made, lengths, strict=True):
                self._sent += not placed.there
                placed.lengths, placed.there = whole, True
                placed.readers -= 1
                if self._keeps:
                    placed.listed, self._listed[placed] = True, placed
                self._give_if_unused(placed)
            self._changed.notify_all()

    def name(self, made: PlacedState, mark: bytes) -> None:
        """What was made is the state of this mark, if it is still there."""
        with self._changed:
            if self._forgotten(made):
                made.mark = mark
                self._list(made)
                self._give_if_unused(made)
                self._changed.notify_all()

    def forget(self, made: PlacedState) -> None:
        """What was made got no name, and gets none any more."""
        with self._changed:
            if self._forgotten(made):
                self._give_if_unused(made)
                self._changed.notify_all()

    def counts(self) -> GpuCounts:
        """A snapshot."""
        with self._changed:
            used, size = self.num_pages - len(self._free), self.shape.page_bytes
            return GpuCounts(
                self._found, self._sent, self._evicted, len(self._listed), used * size, self.num_pages * size
            )

    def _hold(self, wanted: Sequence[tuple[bytes, Lengths]]) -> list[PlacedState] | None:
        found = {mark: self._listed[mark] for mark, _ in wanted if mark in self._listed}
        for placed in found.values():
            placed.readers += 1
        lacking = {mark or number: lengths for number, (mark, lengths) in enumerate(wanted) if mark not in found}
        if not self._make_room(sum(map(self._pages_for, lacking.values()))):
            for placed in found.values():
                placed.readers -= 1
            return None
        brought = {
            key: PlacedState(lengths, self._take(lengths), key if isinstance(key, bytes) else b"")
            for key, lengths in lacking.items()
        }
        for mark in found:
            self._listed.move_to_end(mark)
        self._found += sum(mark in found for mark, _ in wanted)
        return [found.get(mark) or brought[mark or number] for number, (mark, _) in enumerate(wanted)]

    def _grow(self, wanted: Sequence[tuple[bytes, Lengths, Lengths]]) -> list[PlacedState] | None:
        taken_over: dict[int, PlacedState] = {}
        for number, (mark, _, _) in enumerate(wanted):
            placed = self._listed.get(mark) if mark else None
            if placed is not None and placed.readers == 0:
                del self._listed[mark]
                taken_over[number] = placed
        have = sum(self._pages_for(placed.lengths) for placed in taken_over.values())
        if not self._make_room(sum(self._pages_for(whole) for _, _, whole in wanted) - have):
            self._listed.update((placed.mark, placed) for placed in taken_over.values())
            return None
        grown = []
        for number, (_, known, whole) in enumerate(wanted):
            before = taken_over.get(number)
            old: tuple[list[int], ...] = tuple([] for _ in whole) if before is None else before.pages
            pages = tuple(had + more for had, more in zip(old, self._take(whole, old), strict=True))
            grown.append(PlacedState(known, pages, there=before is not None or not any(known)))
            self._found += before is not None
        return grown

    def _when_possible(self, attempt: Callable[[], Made | None]) -> Made:
        end = time.monotonic() + WAIT_SECONDS
        with self._changed:
            while (made := attempt()) is None:
                if not self._changed.wait(end - time.monotonic()):
                    raise EngineFailure(
                        f"all {self.num_pages} pages of states on the GPU were in use for {WAIT_SECONDS:.0f} s; does a "
                        "call hang? If not, a larger engine.gpu_state_mib or fewer executors help"
                    )
        return made

    def _make_room(self, pages: int) -> bool:
        """Whether so many pages are free, after the coldest states that nobody reads have left; if not, none has."""
        leaving, room = [], len(self._free)
        for placed in self._listed.values():
            if room >= pages:
                break
            if placed.readers == 0:
                leaving.append(placed)
                room += sum(map(len, placed.pages))
        for placed in leaving if room >= pages else ():
            del self._listed[placed.key]
            placed.listed = False
            self._give_if_unused(placed)
            self._evicted += bool(placed.mark)
        return room >= pages

    def _list(self, placed: PlacedState) -> None:
        """Let it be found, unless nothing is kept or the same state was brought twice."""
        if self._keeps and placed.mark and placed.mark not in self._listed:
            placed.listed, self._listed[placed.mark] = True, placed

    def _forgotten(self, made: PlacedState) -> bool:
        """Take a state that has no name off the list; whether it was there."""
        if made.mark or not made.listed:
            return False
        made.listed = False
        del self._listed[made]
        return True

    def _give_if_unused(self, placed: PlacedState) -> None:
        if placed.readers == 0 and not placed.listed:
            for pages in placed.pages:
                self._free += pages

    def _take(self, lengths: Lengths, have: Sequence[Sequence[int]] = ()) -> tuple[list[int], ...]:
        """Free pages for so many tokens of each block, beside those that it has."""
        counts = [pages_of(length, self.shape.page) for length in lengths]
        lacking = [count - len(had) for count, had in zip(counts, have or [()] * len(counts), strict=True)]
        return tuple([self._free.pop() for _ in range(count)] for count in lacking)

    def _pages_for(self, lengths: Lengths) -> int:
        return sum(pages_of(length, self.shape.page) for length in lengths)


def pages_within(shape: StateShape, wanted_bytes: int, free_bytes: int, users: int) -> int:
    """How many pages a pool gets: what is wanted, at most SHARE of what is free; but those of `users` users, or at
    least of one, without whom no call can be."""
    fitting = int(free_bytes * SHARE) // shape.page_bytes
    needed = shape.pages_a_user * max(min(users, fitting // shape.pages_a_user), 1)
    return max(min(wanted_bytes // shape.page_bytes, fitting), needed)


SHARE = 0.5
"""Of the GPU memory that is free once the weights are there; the rest is for calls."""
