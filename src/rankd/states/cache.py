"""The user states of one model version: found, extended or computed, and lent to whoever scores.

In: a user, the history as it is now, an executor. Out: a `HeldState` whose arrays nobody changes while it is held.

    nothing kept, or another history than the one kept       encode
    the history is the one that the state was made of        cached
    it only grew, by few tokens a block (`extend_up_to`)     extend: the new tokens alone
    it slid (its oldest tokens went, see `window_step`)      encode
    a table beside the graph has other rows than then        encode
    it is not in memory but on disk, verified                restored, then as above

A state for which a table could not be had, so that defaults stand in for rows, is lent to who asked and not kept.

A user is computed by one thread at a time, and whoever asks meanwhile waits for it (single flight). A state that others
read is never written to: it is extended in place if nobody holds it, else in a copy. What waits is never what is waited
for: a thread that computes takes no second user, so there is no circle.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rankd.engine.backend import Executor, GpuStates
from rankd.engine.state_arrays import APPEND_BUCKETS, copy_tokens, empty_state, write_additions
from rankd.errors import DeadlineExceeded
from rankd.features.assembly import appended_tokens
from rankd.observe.state_metrics import SpillCounts, StateCounts
from rankd.states.arena import Arena
from rankd.states.entries import Claim, Entry, Wanted
from rankd.states.eviction import make_order
from rankd.states.fingerprints import of_history
from rankd.states.lending import NO_TABLES, HeldState, Origin, StateBusy, Tokens, TokenTables, nothing_of, of_its_own
from rankd.states.spill import SpillTier
from rankd.states.state_config import MIB, StateConfig
from rankd.states.storage import StateLayout
from rankd.types import Allocate, Array, UserHistory, UserState

NOW = -math.inf


class StateCache:
    """States in an arena under a byte budget, with a tier on disk if there is one. Thread-safe.

    `rooms` are the history buckets: how many tokens a block a state may have room for. `extends`: whether the model can
    append to a state. `budget_bytes` is that of the configuration unless given; `allocate` makes the memory. `gpu`:
    the states that the engine has, too.

    Raises:
        ConfigError: the budget is smaller than one state.
    """

    def __init__(
        self,
        layout: StateLayout,
        rooms: tuple[int, ...],
        extends: bool,
        config: StateConfig,
        spill: SpillTier | None,
        budget_bytes: int | None = None,
        allocate: Allocate | None = None,
        gpu: GpuStates | None = None,
    ) -> None:
        self.layout, self._spill, self._gpu = layout, spill, gpu
        self._most_new = dict.fromkeys(rooms, APPEND_BUCKETS[-1] if extends else 0)
        self._size_of = {room: layout.size_bytes(room) for room in rooms}
        budget = config.budget_mib * MIB if budget_bytes is None else budget_bytes
        self._arena = Arena(budget, sorted(set(self._size_of.values())), allocate)
        self._order = make_order(config.policy)
        self._entries: dict[str, Entry] = {}
        self._users_of_chunk: defaultdict[int, set[str]] = defaultdict(set)
        self._computing: dict[str, Claim] = {}
        self._changed = threading.Condition()  # guards everything above
        self._origins = dict.fromkeys(Origin, 0)
        self._evicted = self._waited = self._unkept = self._in_gpu = 0

    @contextmanager
    def held(
        self,
        user: str,
        history: UserHistory,
        tokens: Callable[[], Tokens],
        executor: Executor,
        deadline: float | None = None,
        wait: bool = True,
        tables: TokenTables = NO_TABLES,
    ) -> Iterator[HeldState]:
        """The state of a user's history while the block runs.

        `tokens` makes the inputs of `encode` and is called only if the state is not there already; `tables` writes what
        is looked up of those that have to be computed. `deadline` is in seconds of `time.perf_counter`.

        Raises:
            DeadlineExceeded: somebody else was still computing the state at the deadline.
            StateBusy: somebody else computes it, and `wait` is false; see `when_free`.
            EngineFailure: it could not be computed; what was kept before is as it was, or gone.
            Whatever `tables.write` raises.
        """
        mark = of_history(history, tables.contents)
        found, origin = self._claim(user, mark, executor, deadline if wait else NOW), Origin.CACHED
        if isinstance(found, Entry):
            entry = found
        else:
            try:
                made, origin = self._make(user, mark, Wanted(tokens(), tables), executor, found)
            finally:
                self._end_claim(user, found)
                if found.left is not None:
                    self._release(found.left)
            if isinstance(made, UserState):
                yield HeldState(made, origin)
                return
            entry = made
        try:
            yield HeldState(self._state_of(entry), origin)
        finally:
            self._release(entry)

    def kept_tokens(self, user: str, history: UserHistory, tokens: Tokens, tables: TokenTables) -> tuple[int, ...]:
        """How many tokens of each block `held` would not have to compute, as things are; see `States.kept_tokens`."""
        entry = self._entries.get(user)
        if entry is None:
            return nothing_of(tokens)
        lengths = entry.lengths  # read first: somebody may append to it right now, and then they are too few
        return nothing_of(tokens) if self._grown(entry, Wanted(tokens, tables)) is None else lengths

    def has(self, user: str) -> bool:
        """Whether a state of the user is in memory, of whatever history."""
        return user in self._entries

    def when_free(self, user: str, then: Callable[[], None]) -> bool:
        """Whether somebody computes the user's state right now, so that `held` would wait; then `then` is called when
        they have done it."""
        with self._changed:
            claim = self._computing.get(user)
            if claim is None:
                return False
            claim.called.append(then)
            return True

    def abandon(self, user: str, executor: Executor) -> None:
        """An executor hangs. If it computes the user's state nobody waits for it any more, and what it makes is
        nobody's."""
        with self._changed:
            claim = self._computing.get(user)
            if claim is None or claim.executor is not executor:
                return
            entry = self._entries.pop(user, None)
            if entry is not None:  # the one that hangs may write there yet: its slab stays taken until it comes back
                self._users_of_chunk[entry.slab.chunk].discard(user)
                self._order.remove(user)
                entry.retired, entry.readers, claim.left = True, entry.readers + 1, entry
        self._end_claim(user, claim)

    def extend_up_to(self, most_new: Mapping[int, int]) -> None:
        """How many new tokens a block are worth appending to a state, by its room; more are encoded anew."""
        self._most_new = dict(most_new)

    def counts(self) -> StateCounts:
        """A snapshot."""
        spilled = self._spill.counts() if self._spill is not None else SpillCounts()
        with self._changed:
            return StateCounts(
                {origin.value: number for origin, number in self._origins.items()},
                self._evicted,
                self._waited,
                self._unkept,
                len(self._entries),
                self._arena.used_bytes,
                self._arena.capacity_bytes,
                spilled,
                self._in_gpu,
                *(() if self._gpu is None else (self._gpu.counts(),)),
            )

    def close(self) -> None:
        """Write what is in memory to disk, if there is a tier for it: a restart finds it there."""
        if self._spill is None:
            return
        for entry in list(self._entries.values()):
            self._write_out(entry)

    def _claim(self, user: str, mark: bytes, executor: Executor, deadline: float | None) -> Entry | Claim:
        """The entry, held, if it is of this history; else this thread alone may compute the user's state."""
        with self._changed:
            self._waited += user in self._computing
            while user in self._computing:
                left = None if deadline is None else deadline - time.perf_counter()
                if deadline == NOW:
                    raise StateBusy
                if left is not None and left <= 0:
                    raise DeadlineExceeded("timeout_ms passed while another request computed this user's state")
                self._changed.wait(left)
            entry = self._entries.get(user)
            if entry is not None and entry.history_mark == mark:
                entry.readers += 1
                self._order.touch(user)
                self._origins[Origin.CACHED] += 1
                self._in_gpu += self._gpu is not None and self._gpu.has(entry.tokens_mark)
                return entry
            self._computing[user] = claim = Claim(executor)
            return claim

    def _end_claim(self, user: str, claim: Claim) -> None:
        with self._changed:
            if self._computing.get(user) is claim:
                del self._computing[user]
            called, claim.called = claim.called, []
            self._changed.notify_all()
        for then in called:
            then()

    def _make(
        self, user: str, mark: bytes, wanted: Wanted, executor: Executor, claim: Claim
    ) -> tuple[Entry | UserState, Origin]:
        """A held entry for this history, or a state that is not kept: everything is in use, or a table was lost."""
        with self._changed:  # what is there is ours to extend only as long as the claim is ours
            entry, origin = self._entries.get(user) if self._computing.get(user) is claim else None, Origin.CACHED
        if entry is None:
            entry, origin = self._restore(user, claim), Origin.RESTORED
        grown = None if entry is None else self._grown(entry, wanted)
        made: Entry | UserState | None = None
        if entry is not None and grown == 0:
            made = entry
        elif entry is not None and grown is not None:
            made, origin = self._extended(entry, wanted, executor), Origin.EXTENDED
        if made is None:
            made, origin = self._encoded(user, wanted, executor), Origin.ENCODED
        with self._changed:
            self._origins[origin] += 1
            if isinstance(made, UserState):
                self._unkept += 1
                return made, origin
            made.history_mark, made.readers = mark, made.readers + 1
            if self._computing.get(user) is claim:
                self._keep(made)
            else:  # given up as hanging, and somebody else may have made another one
                made.retired = True
        return made, origin

    def _grown(self, entry: Entry, wanted: Wanted) -> int | None:
        """By how many tokens a kept state is to be extended; None if the history has to be encoded."""
        grown = entry.growth(wanted)
        return grown if grown is not None and grown <= self._most_new[wanted.room] else None

    def _encoded(self, user: str, wanted: Wanted, executor: Executor) -> Entry | UserState:
        tokens = wanted.tokens
        right = wanted.tables.write(tokens, nothing_of(tokens))
        entry = self._new_entry(user, wanted.room) if right else None
        if entry is None:
            return UserState(of_its_own(executor.encode(tokens), tokens), wanted.lengths)
        try:
            stored = self._stored(entry)
            if self.layout.direct:
                executor.encode(tokens, stored)
            else:
                self.layout.pack(executor.encode(tokens), stored)
        except BaseException:
            self._give(entry)
            raise
        self._settle(entry, wanted, executor)
        return entry

    def _extended(self, entry: Entry, wanted: Wanted, executor: Executor) -> Entry | UserState | None:
        """The entry with the new tokens appended; a larger copy if it is held by others or too small; one that is not
        kept if a table was lost; None: no room."""
        state, target, specs = self._state_of(entry), entry, self.layout.specs
        new = appended_tokens(wanted.tokens, entry.lengths, APPEND_BUCKETS)
        counts, right = new["history_length"][0].tolist(), wanted.tables.write(new, entry.lengths)
        additions = executor.extend(state, new)
        room = max(wanted.room, entry.room)
        if not right:
            own = empty_state(specs, room, self.layout.state_type)
            copy_tokens(specs, state.arrays, own)
            write_additions(specs, own, state.lengths, additions, counts)
            return UserState(own, wanted.lengths)
        if entry.readers or room > entry.room:
            found = self._new_entry(entry.user, room)
            if found is None:
                return None
            target = found
            arrays = self.layout.unpack(self._stored(target), room)
            copy_tokens(specs, state.arrays, arrays)
        else:
            arrays, entry.history_mark, entry.tokens_mark = state.arrays, b"", b""  # of no history until it is whole
        write_additions(specs, arrays, state.lengths, additions, counts)
        if not self.layout.direct:
            self.layout.pack(arrays, self._stored(target))
        self._settle(target, wanted, executor)
        return target

    def _settle(self, entry: Entry, wanted: Wanted, executor: Executor) -> None:
        """An entry's arrays are of these tokens now, and so is what the executor has made."""
        entry.lengths, entry.tokens_mark, entry.state = wanted.lengths, wanted.mark(wanted.lengths), None
        executor.keep(entry.tokens_mark)

    def _restore(self, user: str, claim: Claim) -> Entry | None:
        """A user's state from disk, in memory again; not held, and nobody else can have it yet."""
        found = self._spill.read(user) if self._spill is not None else None
        if found is None or found[0].room not in self._size_of:
            return None
        header, content = found
        entry = self._new_entry(user, header.room)
        if entry is None:
            return None
        self._arena.bytes_of(entry.slab)[: content.nbytes] = content
        entry.lengths, entry.tokens_mark, entry.history_mark = header.lengths, header.tokens_mark, header.history_mark
        with self._changed:
            if self._computing.get(user) is not claim:
                self._arena.give(entry.slab)
                return None
            self._keep(entry)
        return entry

    def _keep(self, entry: Entry) -> None:
        """Make an entry the user's; the one before leaves when nobody holds it any more."""
        before = self._entries.get(entry.user)
        if before is entry:
            self._order.touch(entry.user)
            return
        self._entries[entry.user] = entry
        if before is not None:
            self._users_of_chunk[before.slab.chunk].discard(entry.user)
        self._users_of_chunk[entry.slab.chunk].add(entry.user)
        if before is None:
            self._order.add(entry.user)
        else:
            self._order.touch(entry.user)
            self._retire(before)

    def _retire(self, entry: Entry) -> None:
        entry.retired = True
        if entry.readers == 0:
            self._arena.give(entry.slab)

    def _release(self, entry: Entry) -> None:
        with self._changed:
            entry.readers -= 1
            if entry.retired and entry.readers == 0:
                self._arena.give(entry.slab)

    def _give(self, entry: Entry) -> None:
        with self._changed:
            self._arena.give(entry.slab)

    def _new_entry(self, user: str, room: int) -> Entry | None:
        """An entry with a slab of its own that nobody knows yet; colder states leave for it. None: all are held."""
        while True:
            with self._changed:
                slab = self._arena.take(self._size_of[room])
                if slab is not None:
                    return Entry(user, slab, room, ())
                leaving = self._leaving(self._size_of[room])
                if not leaving:
                    return None
                for entry in leaving:
                    del self._entries[entry.user]
                    self._users_of_chunk[entry.slab.chunk].discard(entry.user)
                    self._order.remove(entry.user)
                    self._evicted += 1
            for entry in leaving:  # nobody can find them any more, and their slabs are still theirs
                self._write_out(entry)
                self._give(entry)

    def _leaving(self, size: int) -> list[Entry]:
        """The coldest state that nobody uses; if it is of another size, all that share its chunk."""
        blocked: set[int] = set()
        for user in self._order.coldest_first():
            entry = self._entries[user]
            if not self._idle(entry) or entry.slab.chunk in blocked:
                continue
            if self._size_of[entry.room] == size:
                return [entry]
            together = [self._entries[one] for one in self._users_of_chunk[entry.slab.chunk]]
            if len(together) == self._arena.slabs_in(entry.slab.chunk) and all(map(self._idle, together)):
                return together
            blocked.add(entry.slab.chunk)
        return []

    def _idle(self, entry: Entry) -> bool:
        return entry.readers == 0 and entry.user not in self._computing

    def _write_out(self, entry: Entry) -> None:
        if self._spill is not None:
            size = self._size_of[entry.room]
            self._spill.write(entry.header(size), self._arena.bytes_of(entry.slab)[:size])

    def _stored(self, entry: Entry) -> dict[str, Array]:
        return self.layout.arrays(self._arena.bytes_of(entry.slab), entry.room)

    def _state_of(self, entry: Entry) -> UserState:
        if entry.state is not None:
            return entry.state
        state = UserState(self.layout.unpack(self._stored(entry), entry.room), entry.lengths, entry.tokens_mark)
        entry.state = state if self.layout.direct else None
        return state
