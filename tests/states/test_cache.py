"""Any interleaving of events, requests, held states, evictions and restarts: never a stale or a foreign state."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rankd.engine.backend import StateType
from rankd.features.reading.stored_events import empty_history, join
from rankd.states.cache import StateCache
from rankd.states.lending import HeldState, Origin
from rankd.states.spill import SpillTier
from rankd.states.state_config import MIB, Policy, StateConfig, Storage
from rankd.states.storage import StateLayout
from rankd.types import Float32Array, UserHistory
from tests.states.plain_model import SPECS, PlainExecutor, plain_schema, score_of, tokens_of, truth

USERS = st.sampled_from("abcdef")
ROOM_FOR = 3  # states in memory; there are six users


class SmallCache(StateCache):
    """A cache with room for a few states: a budget in MiB is too coarse for that."""

    def __init__(self, config: StateConfig, spill: SpillTier | None, schema_step: int) -> None:
        layout = StateLayout(SPECS, StateType.FP32, Storage.AUTO)
        rooms = plain_schema(schema_step).history_buckets
        super().__init__(layout, rooms, True, config, spill, ROOM_FOR * layout.size_bytes(rooms[-1]))


class States(RuleBasedStateMachine):
    """The cache against a dict of histories."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.schema = plain_schema(window_step=4)
        self.executor = PlainExecutor()
        self.histories: dict[str, UserHistory] = {}
        self.held: list[tuple[ExitStack, HeldState, Float32Array]] = []
        self.clock = 0
        self.corrupted = 0
        self.cache = self.open(Policy.LRU)

    def open(self, policy: Policy) -> StateCache:
        config = StateConfig(policy=policy)
        self.spill = SpillTier(self.folder, "plain", "1", "identity", MIB)
        return SmallCache(config, self.spill, 4)

    @rule(user=USERS, rows=st.lists(st.integers(1, 31), min_size=1, max_size=12), liked=st.booleans())
    def append(self, user: str, rows: list[int], liked: bool) -> None:
        """Events at the end, sometimes more than an extension takes or a window holds."""
        before = self.histories.get(user, empty_history(self.schema))
        times = np.arange(self.clock, self.clock + len(rows), dtype=np.int64) * 86_400
        self.clock += len(rows)
        kinds = np.full(len(rows), 0 if liked else 1, np.int32)
        new = UserHistory(np.asarray(rows, np.int32), kinds, times, np.ones((len(rows), 1), np.float32))
        self.histories[user] = join(before, new).last(self.schema.stored_history)

    @rule(user=USERS, rows=st.lists(st.integers(1, 31), max_size=9))
    def rewrite(self, user: str, rows: list[int]) -> None:
        """Another history altogether, as a client may send along with a request."""
        times = np.arange(len(rows), dtype=np.int64)
        kinds = np.zeros(len(rows), np.int32)
        values = np.ones((len(rows), 1), np.float32)
        self.histories[user] = UserHistory(np.asarray(rows, np.int32), kinds, times, values)

    @rule(user=USERS)
    def rank(self, user: str) -> None:
        history = self.histories.get(user, empty_history(self.schema))
        with self.cache.held(user, history, lambda: tokens_of(history, self.schema), self.executor) as held:
            np.testing.assert_array_equal(score_of(held.state), truth(history, self.schema))
        with self.cache.held(user, history, lambda: tokens_of(history, self.schema), self.executor) as again:
            np.testing.assert_array_equal(score_of(again.state), truth(history, self.schema))
            if len(self.held) < ROOM_FOR - 1:
                assert again.origin is Origin.CACHED

    @rule(user=USERS)
    def hold(self, user: str) -> None:
        """A request that takes its time: its state must stay as it is, whatever happens to the user meanwhile."""
        history = self.histories.get(user, empty_history(self.schema))
        stack = ExitStack()
        held = stack.enter_context(
            self.cache.held(user, history, lambda: tokens_of(history, self.schema), self.executor)
        )
        self.held.append((stack, held, truth(history, self.schema)))

    @precondition(lambda self: self.held)
    @rule()
    def give_back(self) -> None:
        stack, held, expected = self.held.pop(0)
        np.testing.assert_array_equal(score_of(held.state), expected)
        stack.close()

    @rule(user=USERS)
    def fail(self, user: str) -> None:
        """The engine fails on the way: the error comes out, and what follows is right."""
        history = self.histories.get(user, empty_history(self.schema))
        self.executor.fail = RuntimeError("the engine failed")
        try:
            with self.cache.held(user, history, lambda: tokens_of(history, self.schema), self.executor):
                pass
        except RuntimeError:
            pass
        self.executor.fail = None

    @precondition(lambda self: not self.held)
    @rule(policy=st.sampled_from(Policy))
    def restart(self, policy: Policy) -> None:
        self.cache.close()
        self.cache = self.open(policy)

    @rule(seed=st.integers(0, 10_000))
    def damage_a_file(self, seed: int) -> None:
        """One byte of one spilled state is another one now, or its end is missing."""
        files = sorted(self.folder.rglob("*.state"))
        if not files:
            return
        file = files[seed % len(files)]
        content = bytearray(file.read_bytes())
        if not content:
            return
        if seed % 3:
            content[seed % len(content)] ^= 0xFF
        else:
            content = content[: seed % len(content)]
        file.write_bytes(content)

    @invariant()
    def the_budgets_hold(self) -> None:
        counts = self.cache.counts()
        assert counts.used_bytes <= counts.budget_bytes
        assert counts.spill.used_bytes <= MIB
        assert counts.users <= len("abcdef")

    @invariant()
    def what_is_held_stays(self) -> None:
        for _, held, expected in self.held:
            np.testing.assert_array_equal(score_of(held.state), expected)

    def teardown(self) -> None:
        for stack, _, _ in self.held:
            stack.close()
        shutil.rmtree(self.folder, ignore_errors=True)


States.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestStates = States.TestCase
