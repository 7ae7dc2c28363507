"""One table of rows: a key is fetched once, what does not come is stale or nothing, and a new loading is followed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from random import Random

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import rankd.features.cache.cache_kernels  # noqa: F401 - compiles now, before deadlines count
from rankd.errors import ConfigError, StoreFailure, Trouble
from rankd.features.feature_config import MIB, Mode, RowsConfig
from rankd.features.reading import row_table
from rankd.features.reading.row_table import AskedRows, RowTable
from rankd.features.rows.row_decoding import RowDecoder
from rankd.features.rows.row_schema import ColumnKind, RowColumn, RowSchema
from rankd.features.rows.table_meta import TableMeta, encode_meta
from rankd.features.schema import Numeric
from rankd.features.stores.store_keys import hash_id, meta_key, row_key, row_prefix
from rankd.types import Float32Array, RowCounts
from tests.features.reading.remote_store import RemoteStore

NUMBER, LOADING = RowColumn("number", ColumnKind.NUMERIC), RowColumn("loading", ColumnKind.NUMERIC)
SCHEMA = RowSchema("items", "item_id", (NUMBER, LOADING))
OTHER = RowSchema("items", "item_id", (RowColumn("more", ColumnKind.EMBEDDING, 3), LOADING, NUMBER), version=2)
PLAIN = Numeric("number"), Numeric("loading")
DECODERS = {schema.mark: RowDecoder(schema, PLAIN, [], {}) for schema in (SCHEMA, OTHER)}
DEFAULT = np.float32(-1.0)
NO_CACHE, SMALL, ROOMY = 0, 4096, 1 << 20
"""Budgets in bytes; SMALL has room for some 90 rows."""


def row_of(number: int, loading: int, schema: RowSchema = SCHEMA) -> bytes:
    """A row that says which item it is of, and of which loading."""
    words = np.zeros(schema.row_words, np.uint32)
    words[0] = schema.mark
    for name, value in (("number", number), ("loading", loading)):
        found = schema.place_of(name)
        assert found is not None
        words[found[1] : found[1] + 1] = np.asarray([value], np.float32).view(np.uint32)
    return words.tobytes()


class Subject:
    """A table over a store that does what the test says, with a clock of its own. Number 0 is no item."""

    def __init__(self, mode: Mode = Mode.SYNC, budget: int = ROOMY, ttl: float = 60.0, absent: float = 10.0) -> None:
        self.store, self.now_ms = RemoteStore(), 1_000_000
        self.table = RowTable("items", "m", self.store, RowsConfig(mode, ttl, absent, budget / MIB))

    def load(self, loading: int, numbers: range | list[int], schema: RowSchema = SCHEMA) -> None:
        """Have a loading in the store; the table finds it when it looks."""
        self.write({number: row_of(number, loading, schema) for number in numbers}, loading)
        meta = encode_meta(TableMeta(loading, schema, len(numbers)))
        self.store.inner.put([(meta_key("m", "items"), meta)]).result()

    def write(self, rows: dict[int, bytes], loading: int = 1) -> None:
        """Write rows over those of a loading."""
        prefix = row_prefix("m", "items", loading)
        self.store.inner.put([(row_key(prefix, f"i{number}"), row) for number, row in rows.items()]).result()

    def follow(self, loading: int, numbers: range | list[int], schema: RowSchema = SCHEMA) -> None:
        """Load, and let the table look, whatever the store does else."""
        self.load(loading, numbers, schema)
        holds, away = self.store.holds, self.store.away
        self.store.holds, self.store.away = set(), None
        self.table.look()
        self.store.holds, self.store.away = holds, away

    def ask(self, *numbers: int) -> AskedRows:
        keys = np.asarray([hash_id(f"i{number}") if number else 0 for number in numbers], np.uint64)
        asked = self.table.ask(keys, [f"i{number}" for number in numbers])
        assert asked is not None
        return asked

    def read(self, asked: AskedRows, until: float | None = None) -> tuple[RowCounts, Float32Array]:
        """The counts, and (n, 2) the numbers and loadings that were written; DEFAULT where none was."""
        numeric = np.full((asked.keys.shape[0], 2), DEFAULT, np.float32)
        nothing = np.zeros((asked.keys.shape[0], 0), np.int32)
        counts = self.table.read_into(asked, DECODERS[asked.loaded.schema.mark], numeric, nothing, until)
        assert counts.fresh + counts.stale + counts.default + counts.absent == np.count_nonzero(asked.keys)
        return counts, numeric

    def answer(self, *numbers: int) -> tuple[RowCounts, list[float]]:
        """Ask and read at once: the counts, and the loading of each row."""
        counts, numeric = self.read(self.ask(*numbers))
        expected = np.where(numeric[:, 1] == DEFAULT, DEFAULT, numbers)
        np.testing.assert_array_equal(numeric[:, 0], expected)
        return counts, numeric[:, 1].tolist()

    def fetched(self) -> Counter[int]:
        """How often each number was asked of the store, of whatever loading."""
        found: Counter[int] = Counter()
        for key, times in self.store.read.items():
            if key.startswith(b"rankd:r"):
                found[int(key.rpartition(b":i")[2])] += times
        return found


@pytest.fixture(params=[Mode.SYNC, Mode.ASYNC])
def mode(request: pytest.FixtureRequest) -> Mode:
    found: Mode = request.param
    return found


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The moment in ms, which stands still until a test moves it."""
    moment = [1_000_000]
    monkeypatch.setattr(row_table, "_now_ms", lambda: moment[0])
    return moment


def test_nothing_is_read_before_a_loading_is_found(mode: Mode) -> None:
    subject = Subject(mode)
    keys = np.asarray([hash_id("i1")], np.uint64)
    subject.table.look()
    assert subject.table.ask(keys, ["i1"]) is None
    subject.store.inner.put([(meta_key("m", "items"), encode_meta(TableMeta()))]).result()
    subject.table.look()
    assert subject.table.ask(keys, ["i1"]) is None
    subject.follow(1, range(1, 3))
    assert subject.ask(1).loaded.generation == 1
    assert subject.table.figures().generation == 1


def test_a_request_gets_all_rows_in_its_order_with_gaps_for_unknown_items() -> None:
    subject = Subject()
    subject.follow(1, range(1, 10))
    counts, loadings = subject.answer(3, 0, 1, 99, 2, 0)
    assert loadings == [1, DEFAULT, 1, DEFAULT, 1, DEFAULT]
    assert counts == RowCounts(fresh=3, absent=1)
    assert subject.fetched() == {1: 1, 2: 1, 3: 1, 99: 1}
    assert subject.answer(0, 0)[0] == RowCounts()
    subject.answer(1, 2, 3, 99)  # all from the cache, what is absent too
    assert subject.fetched() == {1: 1, 2: 1, 3: 1, 99: 1}


def test_requests_for_the_same_keys_share_a_fetch() -> None:
    subject = Subject()
    subject.follow(1, range(1, 10))
    subject.store.holds = {"get"}
    first, second, third = subject.ask(1, 2, 3), subject.ask(3, 4, 2), subject.ask(2, 3)
    assert [len(asked.flights) for asked in (first, second, third)] == [1, 2, 1]
    assert subject.fetched() == {1: 1, 2: 1, 3: 1, 4: 1}
    subject.store.release(1)  # the one for 4 alone lands first
    assert [flight.landed.done() for flight in second.flights] == [False, True]
    assert subject.read(second)[0] == RowCounts(fresh=1, default=2)
    subject.store.release()
    for asked, numbers in ((first, [1, 2, 3]), (second, [3, 4, 2]), (third, [2, 3])):
        counts, numeric = subject.read(asked)
        assert counts == RowCounts(fresh=len(numbers))
        assert numeric[:, 0].tolist() == numbers
    assert subject.table.figures().shared == 4
    assert subject.table.figures().fetched == 4


def test_a_fetch_that_failed_is_not_shared_by_those_who_come_later() -> None:
    subject = Subject()
    subject.follow(1, range(1, 10))
    subject.store.holds = {"get"}
    first, second = subject.ask(1, 2), subject.ask(2)
    subject.store.take().fail()
    assert all(flight.landed.done() for asked in (first, second) for flight in asked.flights)
    assert subject.read(first)[0] == RowCounts(default=2)
    subject.store.holds = set()
    assert subject.answer(1, 2)[0] == RowCounts(fresh=2)


@pytest.mark.parametrize("budget", [SMALL, ROOMY])
def test_rows_that_left_the_cache_meanwhile_are_read_from_their_flight(budget: int) -> None:
    subject = Subject(budget=budget)
    subject.follow(1, range(1, 400))
    numbers = list(range(1, 300))
    counts, loadings = subject.answer(*numbers)
    assert counts == RowCounts(fresh=299)
    assert loadings == [1.0] * 299
    evicted = subject.table.figures().evicted
    assert (evicted > 0) == (budget == SMALL)
    subject.store.holds = {"get"}
    first, second = subject.ask(*range(300, 340)), subject.ask(*range(320, 400))
    while subject.store.waiting:
        subject.store.release(-1)
    subject.store.holds = set()
    subject.answer(*numbers)
    assert subject.read(first)[0] == RowCounts(fresh=40)
    assert subject.read(second)[0] == RowCounts(fresh=80)


@pytest.mark.parametrize("answers", [True, False])
def test_a_row_that_was_here_and_has_left_is_fetched_again(mode: Mode, answers: bool) -> None:
    """By a sync table, and not for longer than the request waits."""
    subject = Subject(mode)
    subject.follow(1, range(1, 10))
    subject.answer(1, 2, 3)
    asked = subject.ask(1, 2, 3, 0)
    assert asked.flights == []
    assert asked.loaded.cache is not None
    asked.loaded.cache.drop(asked.keys[:2])
    subject.store.holds = set() if answers else {"get"}
    missing = RowCounts(fresh=1, default=2)
    expected = RowCounts(fresh=3) if answers and mode is Mode.SYNC else missing
    assert subject.read(asked, time.perf_counter() + 0.05)[0] == expected
    times = 2 if mode is Mode.SYNC else 1
    assert subject.fetched() == {1: times, 2: times, 3: 1}


def test_without_a_cache_every_request_fetches() -> None:
    subject = Subject(budget=NO_CACHE)
    subject.follow(1, range(1, 10))
    for times in (1, 2):
        counts, loadings = subject.answer(2, 0, 77, 1, 0)
        assert counts == RowCounts(fresh=2, absent=1)
        assert loadings == [1, DEFAULT, DEFAULT, 1, DEFAULT]
        assert subject.fetched() == {1: times, 2: times, 77: times}
    assert subject.answer(0)[0] == RowCounts()
    subject.store.away = Trouble.DOWN
    assert subject.answer(0, 1)[0] == RowCounts(default=1)
    figures = subject.table.figures()
    assert (figures.cached_rows, figures.cache_bytes, figures.budget_bytes) == (0, 0, 0)


def test_a_row_whose_time_is_over_is_read_anew_and_stale_if_that_fails(clock: list[int]) -> None:
    subject = Subject(ttl=60.0)
    subject.follow(1, range(1, 4))
    subject.answer(1, 2)
    subject.write({1: row_of(1, 7)})
    clock[0] += 59_000
    assert subject.answer(1)[1] == [1]
    clock[0] += 2_000
    subject.store.away = Trouble.TIMEOUT
    assert subject.answer(1, 2, 3) == (RowCounts(stale=2, default=1), [1, 1, DEFAULT])
    assert subject.table.figures().oldest_seconds == 61.0
    assert subject.table.figures().oldest_seconds == 0.0
    subject.store.away = None
    assert subject.answer(1, 2, 3) == (RowCounts(fresh=3), [7, 1, 1])
    subject.store.holds = {"get"}
    clock[0] += 61_000
    asked = subject.ask(1)
    assert subject.read(asked)[0] == RowCounts(stale=1)  # its time to wait is over
    subject.store.release()
    assert subject.read(asked)[0] == RowCounts(fresh=1)


def test_that_there_is_no_row_is_believed_for_a_while(clock: list[int]) -> None:
    subject = Subject(absent=10.0)
    subject.follow(1, [1])
    assert subject.answer(5)[0] == RowCounts(absent=1)
    subject.write({5: row_of(5, 1)})
    clock[0] += 9_000
    assert subject.answer(5)[0] == RowCounts(absent=1)
    clock[0] += 2_000
    subject.store.away = Trouble.DOWN
    assert subject.answer(5)[0] == RowCounts(absent=1)  # as far as is known
    subject.store.away = None
    assert subject.answer(5) == (RowCounts(fresh=1), [1])


def test_rows_of_another_length_or_mark_are_not_decoded() -> None:
    wrong = {1: b"", 2: b"\1" * 7, 3: b"\1" * SCHEMA.row_bytes, 4: row_of(4, 1, OTHER), 5: row_of(5, 1)}
    for budget in (NO_CACHE, ROOMY):
        subject = Subject(budget=budget)
        subject.follow(1, [])
        subject.write(wrong)
        for _ in range(2):
            counts, loadings = subject.answer(1, 2, 3, 4, 5)
            assert counts == RowCounts(fresh=1, default=4, wrong_schema=4)
            assert loadings == [DEFAULT] * 4 + [1]


def test_rows_of_the_loading_before_are_stale_and_not_kept_when_they_come_late() -> None:
    subject = Subject()
    subject.follow(1, range(1, 9))
    subject.answer(1, 2)
    subject.store.holds = {"get"}
    late = subject.ask(3)
    subject.follow(2, range(1, 5))
    now = subject.ask(1, 2)
    assert subject.read(now)[0] == RowCounts(stale=2)
    subject.store.release(0)
    assert subject.read(late)[1][0].tolist() == [3, 1]  # who asked before gets what it asked for
    assert subject.table.figures().cached_rows == 2
    subject.store.release(0)
    counts, numeric = subject.read(now)
    assert (counts, numeric[:, 1].tolist()) == (RowCounts(fresh=2), [2, 2])
    subject.store.holds = set()
    assert subject.answer(3, 7) == (RowCounts(fresh=1, absent=1), [2, DEFAULT])


@pytest.mark.parametrize("schema", [SCHEMA, OTHER])
def test_a_fetch_of_the_loading_before_is_not_shared(schema: RowSchema) -> None:
    """Whoever asks once the new loading is read waits for its rows, and reads them by their own schema."""
    subject = Subject()
    subject.follow(1, range(1, 9))
    subject.store.holds = {"get"}
    before = subject.ask(1, 2)
    subject.follow(2, range(1, 9), schema)
    after, shared = subject.ask(1, 3), subject.ask(1)
    subject.store.release(0)
    assert subject.read(before)[0] == RowCounts(fresh=2)
    assert subject.read(after)[0] == RowCounts(default=2)
    again = subject.ask(1)  # the late landing took nothing of the new flights away
    subject.store.release_all()
    for asked in (after, shared, again):
        counts, numeric = subject.read(asked)
        assert counts == RowCounts(fresh=len(asked.keys))
        assert set(numeric[:, 1].tolist()) == {2}
    assert subject.fetched() == {1: 2, 2: 1, 3: 1}


def test_another_schema_has_another_cache_of_the_same_budget() -> None:
    subject = Subject()
    subject.follow(1, range(1, 9))
    old = subject.ask(1, 2)
    subject.follow(2, range(1, 9), OTHER)
    assert subject.table.figures().cached_rows == 0
    assert subject.answer(1, 2) == (RowCounts(fresh=2), [2, 2])
    assert subject.read(old)[0] == RowCounts(fresh=2)  # by the schema and from the cache that it asked with
    subject.follow(3, range(1, 9), OTHER)
    subject.store.away = Trouble.DOWN
    assert subject.answer(1) == (RowCounts(stale=1), [2])


def test_a_description_that_cannot_be_read_changes_nothing() -> None:
    subject = Subject()
    subject.follow(1, [1])
    for garbage in (b"", b"{", b"\xff\xfe", b'{"generation": "2"}', b'{"of a newer release": 1}'):
        subject.store.inner.put([(meta_key("m", "items"), garbage)]).result()
        for _ in range(2):
            with pytest.raises(StoreFailure, match="cannot be read") as broken:
                subject.table.look()
            assert broken.value.trouble is Trouble.BROKEN
        assert subject.answer(1)[1] == [1]
    subject.store.inner.delete([meta_key("m", "items")]).result()
    subject.table.look()
    assert subject.answer(1)[1] == [1]
    subject.store.away = Trouble.TIMEOUT
    with pytest.raises(StoreFailure):
        subject.table.look()
    assert subject.answer(1)[1] == [1]
    subject.store.away = None
    subject.follow(2, [1])
    assert subject.answer(1)[1] == [2]


def test_a_loading_that_cannot_be_kept_is_tried_again() -> None:
    """A budget below one bucket of the new rows; until they fit the artifact's own values serve."""
    subject = Subject(budget=SMALL)
    subject.follow(1, [1])
    wide = RowSchema("items", "item_id", (NUMBER, LOADING, RowColumn("v", ColumnKind.EMBEDDING, 100)))
    subject.load(2, [1], wide)
    for _ in range(2):
        with pytest.raises(ConfigError, match="row cache"):
            subject.table.look()
        assert subject.table.loaded is None
    subject.follow(3, [1])
    assert subject.answer(1)[1] == [3]


def test_asynchronous_requests_do_not_wait_and_what_they_miss_is_fetched_together() -> None:
    subject = Subject(Mode.ASYNC)
    subject.follow(1, range(1, 30))
    subject.store.holds = {"get"}
    assert subject.answer(1, 2)[0] == RowCounts(default=2)
    assert subject.ask(1).flights == []
    for number in range(1, 10):
        subject.answer(number, number + 1, 0)
    assert len(subject.store.waiting) == 1
    subject.store.release()
    assert len(subject.store.waiting) == 1
    assert len(subject.store.waiting[0].keys) == 8  # 3 to 10: 1 and 2 were on their way
    assert subject.answer(1, 2, 3)[0] == RowCounts(fresh=2, default=1)
    subject.store.release()
    assert subject.store.waiting == []
    assert subject.answer(*range(1, 11))[0] == RowCounts(fresh=10)
    assert set(subject.fetched().values()) == {1}
    assert subject.answer(20)[0] == RowCounts(default=1)  # the next one starts again
    subject.store.release()
    assert subject.answer(20)[0] == RowCounts(fresh=1)


def test_what_failed_behind_requests_is_asked_for_again_by_who_needs_it(clock: list[int]) -> None:
    subject = Subject(Mode.ASYNC, ttl=60.0)
    subject.follow(1, range(1, 30))
    subject.answer(1)
    clock[0] += 61_000
    subject.store.holds = {"get"}
    for _ in range(3):
        assert subject.answer(1)[0] == RowCounts(stale=1)
        subject.store.take().fail()
    subject.store.holds, subject.store.away = set(), Trouble.DOWN
    assert subject.answer(1, 2)[0] == RowCounts(stale=1, default=1)
    subject.store.away = None
    subject.answer(1, 2)
    assert subject.answer(1, 2)[0] == RowCounts(fresh=2)


def test_what_waits_behind_requests_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_table, "MOST_BEHIND", 10)
    monkeypatch.setattr(row_table, "BEHIND_AT_ONCE", 4)
    subject = Subject(Mode.ASYNC)
    subject.follow(1, range(1, 100))
    subject.store.holds = {"get"}
    for number in range(1, 100):
        subject.answer(number)
    sizes = []
    while subject.store.waiting:
        sizes.append(len(subject.store.release().keys))
    assert sizes == [1, 4, 4, 2]
    subject.store.holds = set()
    subject.answer(99)
    assert subject.answer(99)[0] == RowCounts(fresh=1)


@pytest.mark.parametrize("away", [None, Trouble.DOWN])
def test_a_store_that_answers_at_once_is_no_endless_way_down(
    away: Trouble | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of batches wait when the store begins to answer (or to refuse) before it returns."""
    monkeypatch.setattr(row_table, "BEHIND_AT_ONCE", 1)
    subject = Subject(Mode.ASYNC, budget=ROOMY)
    subject.follow(1, range(1, 400))
    subject.store.holds = {"get"}
    subject.answer(*range(1, 400))
    subject.store.holds, subject.store.away = set(), away
    subject.store.release() if away is None else subject.store.take().fail()
    subject.store.away = None
    for _ in range(400):  # whoever comes next has the next batch fetched
        if subject.answer(*range(1, 400))[0].fresh == 399:
            break
    assert subject.answer(*range(1, 400))[0] == RowCounts(fresh=399)


def test_behind_requests_the_new_loading_is_fetched() -> None:
    subject = Subject(Mode.ASYNC)
    subject.follow(1, range(1, 30))
    subject.store.holds = {"get"}
    subject.answer(1)
    subject.answer(2)
    subject.follow(2, range(1, 30), OTHER)
    subject.answer(1)  # the one under way is of the loading before
    subject.store.release_all()
    assert subject.fetched() == {1: 2, 2: 1}
    assert subject.answer(1, 2) == (RowCounts(fresh=2), [2, 2])
    assert subject.fetched() == {1: 2, 2: 1}


class RowTableMachine(RuleBasedStateMachine):
    """Requests, answers in any order, failures, new loadings and time, mixed. Every row that is read was written."""

    NUMBERS = st.lists(st.integers(0, 6), min_size=1, max_size=4, unique=True)

    @initialize(mode=st.sampled_from(Mode), budget=st.sampled_from([NO_CACHE, ROOMY]))
    def start(self, mode: Mode, budget: int) -> None:
        self.patch = pytest.MonkeyPatch()
        self.now_ms = 1_000_000
        self.patch.setattr(row_table, "_now_ms", lambda: self.now_ms)
        self.subject, self.asked, self.cached = Subject(mode, budget), list[tuple[AskedRows, list[int]]](), budget > 0
        self.rows: dict[int, set[int]] = {}
        self.load(SCHEMA, {1, 2, 3})
        self.subject.store.holds = {"get"}

    @rule(schema=st.sampled_from([SCHEMA, SCHEMA, OTHER]), there=st.sets(st.integers(1, 6), min_size=3))
    def load(self, schema: RowSchema, there: set[int]) -> None:
        loading = len(self.rows) + 1
        self.rows[loading] = there
        self.subject.follow(loading, sorted(there), schema)

    @rule(numbers=NUMBERS)
    def ask(self, numbers: list[int]) -> None:
        self.asked.append((self.subject.ask(*numbers), numbers))

    @precondition(lambda self: self.subject.store.waiting)
    @rule(data=st.data(), fails=st.booleans())
    def land(self, data: st.DataObject, fails: bool) -> None:
        call = self.subject.store.take(data.draw(st.integers(0, len(self.subject.store.waiting) - 1)))
        call.fail() if fails else call.answer()

    @rule(seconds=st.integers(1, 90))
    def wait(self, seconds: int) -> None:
        self.now_ms += seconds * 1000

    @invariant()
    def all_requests_read_what_was_written(self) -> None:
        for asked, numbers in self.asked[-8:]:
            counts, numeric = self.subject.read(asked)
            old = 0
            for (number, loading), wanted in zip(numeric.tolist(), numbers, strict=True):
                if loading != DEFAULT:
                    assert number == wanted
                    assert wanted in self.rows[int(loading)]
                    old += loading < asked.loaded.generation
            assert old <= counts.stale
            assert counts.fresh + counts.stale == np.count_nonzero(numeric[:, 1] != DEFAULT)
            assert counts.wrong_schema == 0
            assert self.cached or counts.stale == 0

    @invariant()
    def each_row_is_fetched_once_at_a_time(self) -> None:
        on_their_way = Counter(key for call in self.subject.store.waiting for key in call.keys)
        assert not self.cached or max(on_their_way.values(), default=0) <= 1

    def teardown(self) -> None:
        self.subject.store.release_all()
        everything = range(7)
        self.subject.answer(*everything)
        counts, loadings = self.subject.answer(*everything)
        there = self.rows[len(self.rows)]
        assert counts == RowCounts(fresh=len(there), absent=6 - len(there))
        assert loadings == [len(self.rows) if number in there else DEFAULT for number in everything]
        assert self.subject.table._flying == {}
        assert self.subject.table._behind == {}
        self.patch.undo()


TestRowTableMachine = RowTableMachine.TestCase
TestRowTableMachine.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("budget", [SMALL, ROOMY])
def test_requests_of_many_threads_while_loadings_change(mode: Mode, budget: int) -> None:
    """Answers come on a thread of the store's, in any order; rows that are called fresh are never of an old loading."""
    subject, wrong = Subject(mode, budget), list[str]()
    over, quiet = threading.Event(), threading.Event()
    subject.follow(1, range(1, 60))
    subject.store.holds = {"get"}

    def answer() -> None:
        random = Random(1)
        while not quiet.wait(0.0 if subject.store.waiting else 0.0002):
            if subject.store.waiting:
                call = subject.store.take(random.randrange(len(subject.store.waiting)))
                call.fail() if random.random() < 0.1 and b":m:" not in call.keys[0] else call.answer()

    def live(seed: int) -> None:
        random = Random(seed)
        while not over.is_set():
            numbers = random.sample(range(1, 200), 30)
            keys = np.asarray([hash_id(f"i{number}") for number in numbers], np.uint64)
            asked = subject.table.ask(keys, [f"i{number}" for number in numbers])
            if asked is None:
                continue  # the cache for another schema is being made
            for flight in asked.flights:
                flight.landed.result(20)
            counts, numeric = subject.read(asked)
            old = np.count_nonzero((numeric[:, 1] != DEFAULT) & (numeric[:, 1] < asked.loaded.generation))
            if old > counts.stale:
                wrong.append(f"{old} rows are older than loading {asked.loaded.generation}, {counts} say")

    with ThreadPoolExecutor(4) as pool:
        answering = pool.submit(answer)
        living = [pool.submit(live, seed) for seed in (2, 3, 4)]
        for loading in range(2, 50):
            subject.load(loading, range(1, 60), SCHEMA if loading % 8 else OTHER)
            subject.table.look()
        over.set()
        for done in living:
            done.result(20)
        quiet.set()
        answering.result(20)
    subject.store.release_all()
    assert wrong == []
    assert subject.table._flying == {}
    assert not subject.table._behind_flying
