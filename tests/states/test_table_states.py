"""Tables beside the graph that change, get lost and take their time: no state of other rows is ever lent for these."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from rankd.engine.backend import StateType
from rankd.features.reading.stored_events import empty_history, join
from rankd.features.schema import EmbeddedFeature, EmbeddedSide
from rankd.features.token_rows import RowsAway
from rankd.states.cache import StateCache
from rankd.states.lending import HeldState, NoStates, Origin
from rankd.states.spill import SpillTier
from rankd.states.state_config import MIB, StateConfig, Storage
from rankd.states.storage import StateLayout
from rankd.types import Array, Float32Array, UserHistory, UserState
from tests.features.sample_schema import make_history
from tests.states.plain_model import SPECS, PlainExecutor, plain_schema, score_of, tokens_of

SCHEMA = msgspec.structs.replace(
    plain_schema(window_step=4), embedded=(EmbeddedFeature("item", 1, EmbeddedSide.EVENT_ITEM),)
)
USERS = st.sampled_from("abcd")


class TableExecutor(PlainExecutor):
    """A token's memory is of what was looked up for it, not of its row."""

    def encode(self, history: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        return super().encode(read_from_table(history), into)

    def extend(self, state: UserState, new: Mapping[str, Array]) -> Mapping[str, Array]:
        return super().extend(state, read_from_table(new))


def read_from_table(tokens: Mapping[str, Array]) -> dict[str, Array]:
    return {**tokens, "history_item": tokens["history_embedded"][..., 0]}


class PlainTables:
    """Row r is r times `factor`; a lost table gives zeros. `held` rows are on their way."""

    def __init__(self, factor: int = 1) -> None:
        self.factor, self.lost, self.held = factor, False, False
        self.asked: list[tuple[tuple[int, ...], int]] = []

    @property
    def contents(self) -> bytes:
        return str(self.factor).encode()

    def write(self, tokens: Mapping[str, Array], first: Sequence[int]) -> bool:
        if self.held:
            raise RowsAway(lambda then: None)
        self.asked.append((tuple(first), int(tokens["history_length"].sum())))
        real = np.arange(tokens["history_item"].shape[2]) < tokens["history_length"][..., None]
        rows = np.where(real, tokens["history_item"], 0) * (0 if self.lost else self.factor)
        tokens["history_embedded"][...] = rows[..., None]
        return not self.lost


def truth(history: UserHistory, factor: int) -> Float32Array:
    with NoStates().held("", history, made(history), TableExecutor(), tables=PlainTables(factor)) as held:
        return score_of(held.state)


def made(history: UserHistory) -> Callable[[], Mapping[str, Array]]:
    return lambda: tokens_of(history, SCHEMA)


def cache_in(spill: SpillTier | None = None, users: int = 2) -> StateCache:
    layout = StateLayout(SPECS, StateType.FP32, Storage.AUTO)
    room = SCHEMA.history_buckets[-1]
    return StateCache(layout, SCHEMA.history_buckets, True, StateConfig(), spill, users * layout.size_bytes(room))


class States(RuleBasedStateMachine):
    """Four users, room for two, a tier on disk; any interleaving."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.tables, self.executor, self.clock = PlainTables(), TableExecutor(), 0
        self.histories: dict[str, UserHistory] = {}
        self.open()

    def open(self) -> None:
        self.cache = cache_in(SpillTier(self.folder, "plain", "1", "identity", MIB))

    @rule(user=USERS, rows=st.lists(st.integers(1, 31), min_size=1, max_size=5))
    def append(self, user: str, rows: list[int]) -> None:
        before = self.histories.get(user, empty_history(SCHEMA))
        times = [86_400 * (self.clock + number) for number in range(len(rows))]
        self.clock += len(rows)
        self.histories[user] = join(before, make_history(rows, times=times)).last(SCHEMA.stored_history)

    @rule(factor=st.integers(1, 3))
    def other_tables(self, factor: int) -> None:
        self.tables.factor = factor

    @rule(lost=st.booleans())
    def lose(self, lost: bool) -> None:
        self.tables.lost = lost

    @rule()
    def restart(self) -> None:
        self.cache.close()
        self.open()

    @rule(user=USERS)
    def rank(self, user: str) -> None:
        history, asked = self.histories.get(user, empty_history(SCHEMA)), len(self.tables.asked)
        with self.held(user, history) as held:
            right = not self.tables.lost or len(self.tables.asked) == asked
            if right:
                np.testing.assert_array_equal(score_of(held.state), truth(history, self.tables.factor))
            elif held.origin is Origin.ENCODED:
                np.testing.assert_array_equal(score_of(held.state), truth(history, 0))

    @contextmanager
    def held(self, user: str, history: UserHistory) -> Iterator[HeldState]:
        with self.cache.held(user, history, made(history), self.executor, tables=self.tables) as held:
            yield held

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


States.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestStates = States.TestCase


def test_new_tokens_alone_are_looked_up() -> None:
    cache, tables, executor = cache_in(), PlainTables(), TableExecutor()
    for count, expected in ((4, ((0, 0), 8)), (6, ((4, 4), 4))):
        history = make_history(list(range(3, 3 + count)), events=[0] * count)
        tokens = tokens_of(history, SCHEMA)
        kept = cache.kept_tokens("u", history, tokens, tables)
        with cache.held("u", history, made(history), executor, tables=tables) as held:
            np.testing.assert_array_equal(score_of(held.state), truth(history, 1))
        assert (kept, tables.asked[-1]) == (expected[0], expected)
        assert cache.kept_tokens("u", history, tokens, tables) == (count, count)
    assert len(tables.asked) == 2
    assert cache.kept_tokens("u", history, tokens, PlainTables(2)) == (0, 0)
    assert NoStates().kept_tokens("u", history, tokens, tables) == (0, 0)


def test_a_state_that_lacks_a_table_is_lent_and_not_kept() -> None:
    """Encoded or extended; what was kept before stays as it is, and is extended when the table is back."""
    cache, tables, executor = cache_in(), PlainTables(), TableExecutor()
    short, longer = make_history([5, 6, 7]), make_history([5, 6, 7, 8])
    tables.lost = True
    for _ in range(2):
        with cache.held("u", short, made(short), executor, tables=tables) as held:
            assert held.origin is Origin.ENCODED
            np.testing.assert_array_equal(score_of(held.state), truth(short, 0))
    assert not cache.has("u")
    tables.lost = False
    with cache.held("u", short, made(short), executor, tables=tables) as before:
        tables.lost = True
        with cache.held("u", longer, made(longer), executor, tables=tables) as held:
            assert held.origin is Origin.EXTENDED
            lacking = truth(longer, 1) - score_of(held.state)
            assert lacking[0, :2].tolist() == [8.0, 8.0], "of the new token alone nothing is known"
        np.testing.assert_array_equal(score_of(before.state), truth(short, 1))
    with cache.held("u", short, made(short), executor, tables=tables) as again:
        assert again.origin is Origin.CACHED
    tables.lost = False
    with cache.held("u", longer, made(longer), executor, tables=tables) as whole:
        assert whole.origin is Origin.EXTENDED
        np.testing.assert_array_equal(score_of(whole.state), truth(longer, 1))
    assert cache.counts().unkept == 3


def test_nobody_waits_for_a_state_whose_rows_are_on_their_way() -> None:
    cache, tables, executor, history = cache_in(), PlainTables(), TableExecutor(), make_history([5, 6, 7])
    tables.held = True
    with pytest.raises(RowsAway), cache.held("u", history, made(history), executor, tables=tables):
        pass
    assert not cache.when_free("u", lambda: None)
    assert (executor.encoded, cache.counts().used_bytes) == (0, 0)
    tables.held = False
    with cache.held("u", history, made(history), executor, wait=False, tables=tables) as held:
        np.testing.assert_array_equal(score_of(held.state), truth(history, 1))
