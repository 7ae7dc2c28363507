"""The features of a model version over a store that does what the test says: what is found, what is waited for, what is
named."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import rankd.features.cache.cache_kernels  # noqa: F401 - compiles now, before deadlines count
from rankd.artifact import Artifact
from rankd.errors import ConfigError, InvalidRequest, StoreFailure, Trouble
from rankd.features.catalogue import Catalogue
from rankd.features.feature_config import FeatureConfig, HistoriesConfig, Mode, RowsConfig
from rankd.features.reading import row_table, shared_features
from rankd.features.reading.shared_features import FeatureService
from rankd.features.reading.version_features import Fetch, VersionFeatures
from rankd.features.rows.row_packing import pack_rows
from rankd.features.rows.row_schema import ColumnKind, RowColumn, RowSchema
from rankd.features.rows.table_meta import TableMeta, encode_meta
from rankd.features.schema import FIRST_ITEM_ROW, UNKNOWN_ROW
from rankd.features.stores.event_records import RawEvent, pack_events
from rankd.features.stores.store_keys import history_key, meta_key, row_key, row_prefix
from rankd.features.tables import normalise
from rankd.types import Event, Float32Array, Int32Array, RowCounts
from tests.features.reading.remote_store import RemoteStore
from tests.features.stores.redis_server import eventually

ITEMS = RowSchema(
    "items", "item_id", (RowColumn("minutes", ColumnKind.NUMERIC), RowColumn("genre", ColumnKind.CATEGORICAL))
)
USERS = RowSchema("users", "user_id", (RowColumn("plan", ColumnKind.CATEGORICAL),))
WRONG_KIND = RowSchema("items", "item_id", (RowColumn("minutes", ColumnKind.CATEGORICAL),), version=2)
MINUTES = 7  # its place among the numeric columns of the packaged model
FOREVER = 60.0


class Subject:
    """The packaged model's features over a store, with a table of three items and one of three users."""

    def __init__(self, artifact: Artifact, catalogue: Catalogue, config: FeatureConfig) -> None:
        self.store, self.schema, self.catalogue = RemoteStore(), artifact.schema, catalogue
        self.items, self.users = catalogue.ids.items[:3], catalogue.ids.users[:3]
        self.genres, self.plans = catalogue.vocabulary("item", "genre"), catalogue.vocabulary("user", "plan")
        minutes = {"item_id": self.items, "minutes": [10.0, None, 30.0], "genre": [self.genres[5], None, "unheard of"]}
        self.put_rows(ITEMS, pl.DataFrame(minutes))
        self.put_rows(USERS, pl.DataFrame({"user_id": self.users, "plan": [self.plans[2], None, self.plans[0]]}))
        self.service = FeatureService(config, self.store)
        self.shared = self.service.of("demo")
        self.features = VersionFeatures(artifact.schema, catalogue, self.shared)

    def put_rows(self, schema: RowSchema, frame: pl.DataFrame, loading: int = 1, namespace: str = "demo") -> None:
        """Have a loading in the store."""
        packed, prefix = pack_rows(schema, frame, 0), row_prefix(namespace, schema.table, loading)
        rows = [(row_key(prefix, one), words.tobytes()) for one, words in zip(packed.ids, packed.words, strict=True)]
        meta = encode_meta(TableMeta(loading, schema, len(rows)))
        self.store.inner.put([*rows, (meta_key(namespace, schema.table), meta)]).result()

    def rows_of(self, *items: str) -> Int32Array:
        return self.catalogue.rows_of(items)

    def begin(self, user: str = "", items: tuple[str, ...] = (), seconds: float = FOREVER) -> Fetch:
        """Ask for the three items, of the first user."""
        return self.features.begin(user or self.users[0], items or self.items, True, time.perf_counter() + seconds)

    def fill(self, fetch: Fetch) -> tuple[Float32Array, Int32Array]:
        """The numeric columns and the categories of the candidates, in a bucket with more room than they need."""
        count = fetch.candidates.shape[0]
        numeric, categories = np.zeros((1, count + 2, 12), np.float32), np.zeros((1, count + 2, 1), np.int32)
        numeric[0, :count, :8] = self.catalogue.items.numeric[fetch.candidates]
        categories[0, :count] = self.catalogue.items.categories[fetch.candidates]
        self.features.fill_items(fetch, {"candidate_numeric": numeric, "candidate_categories": categories})
        assert not numeric[0, count:].any()
        assert not numeric[0, :, 8:].any()
        return numeric[0, :count, :8], categories[0, :count]

    def degraded(self, fetch: Fetch) -> set[str]:
        """What an answer is to be named after all has been read."""
        self.features.history(fetch)
        self.features.user(fetch)
        self.fill(fetch)
        return set(self.features.degraded(fetch))

    def close(self) -> None:
        self.store.release_all()
        self.features.close()
        self.service.close()


Make = Callable[..., Subject]


@pytest.fixture(scope="module")
def artifact(demo_models: Path) -> Artifact:
    return Artifact.open(demo_models / "demo")


@pytest.fixture(scope="module")
def catalogue(artifact: Artifact) -> Catalogue:
    return Catalogue.load(artifact.path / "tables", artifact.schema)


@pytest.fixture
def make(artifact: Artifact, catalogue: Catalogue) -> Iterator[Make]:
    made: list[Subject] = []

    def subject(mode: Mode = Mode.SYNC, ttl: float = FOREVER) -> Subject:
        rows = RowsConfig(mode, ttl, budget_mib=0.25)
        config = FeatureConfig(items=rows, users=rows, histories=HistoriesConfig(mode))
        made.append(Subject(artifact, catalogue, config))
        return made[-1]

    yield subject
    for one in made:
        one.close()


@pytest.fixture
def subject(make: Make) -> Subject:
    return make()


def test_rows_of_the_store_are_read_as_in_training(subject: Subject) -> None:
    other = subject.catalogue.ids.items[9]
    fetch = subject.begin(items=(*subject.items, "never heard of", other))
    numeric, categories = subject.fill(fetch)
    known = subject.catalogue.items
    column = subject.schema.item_numeric[MINUTES]
    expected = normalise(column, np.asarray([10.0, np.nan, 30.0], np.float32))
    np.testing.assert_allclose(numeric[:3, MINUTES], expected, rtol=1e-6)
    assert categories[:3, 0].tolist() == [subject.schema.item_categorical[0].offset + 5, 0, 0]
    np.testing.assert_array_equal(numeric[:, :MINUTES], known.numeric[fetch.candidates][:, :MINUTES])
    np.testing.assert_array_equal(numeric[3:], known.numeric[[UNKNOWN_ROW, FIRST_ITEM_ROW + 9]])
    assert fetch.counts["items"] == RowCounts(fresh=3, absent=1)
    assert subject.degraded(fetch) == set()


def test_the_users_row_lies_over_the_artifacts(subject: Subject) -> None:
    offset = subject.schema.user_categorical[0].offset
    codes = [subject.features.user(subject.begin(user)).categories.tolist() for user in subject.users]
    assert codes == [[offset + 2], [0], [offset]]
    other = subject.catalogue.ids.users[7]
    for name in (other, "somebody new"):
        fetch = subject.begin(name)
        expected = subject.features.user_features(name).categories
        np.testing.assert_array_equal(subject.features.user(fetch).categories, expected)
        assert fetch.counts["users"] == RowCounts(absent=1)


def test_asking_again_finds_the_rows_here(subject: Subject) -> None:
    for _ in range(3):
        fetch = subject.begin()
        assert subject.degraded(fetch) == set()
        assert fetch.counts["items"] == RowCounts(fresh=3)
    figures = subject.shared.figures()
    assert (figures.tables["items"].fetched, figures.tables["users"].fetched) == (3, 1)
    assert figures.tables["items"].counts == RowCounts(fresh=9)
    assert figures.histories.freshness["fresh"] == 3


def test_each_thing_that_is_missing_is_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    moment = [1_000_000]
    monkeypatch.setattr(row_table, "_now_ms", lambda: moment[0])
    subject = make(ttl=60.0)
    assert subject.degraded(subject.begin()) == set()
    subject.store.away = Trouble.DOWN
    assert subject.degraded(subject.begin()) == {"history_stale", "store_down"}
    moment[0] += 61_000
    assert subject.degraded(subject.begin()) == {"items_stale", "user_stale", "history_stale", "store_down"}
    known, new = subject.items[0], subject.catalogue.ids.items[9]
    mixed = subject.begin(subject.catalogue.ids.users[9], (known, new))
    assert subject.degraded(mixed) == {"items_stale", "items_default", "user_default", "history_default", "store_down"}
    assert mixed.counts["items"] == RowCounts(stale=1, default=1)
    subject.store.away = Trouble.TIMEOUT
    assert "store_timeout" in subject.degraded(subject.begin())
    subject.store.away = None
    assert subject.degraded(subject.begin()) == set()


def test_absent_rows_are_named_where_they_may_have_been_thrown_away(subject: Subject) -> None:
    other = subject.catalogue.ids.items[9]
    assert subject.degraded(subject.begin(items=(other,))) == set()
    subject.store.trouble = Trouble.EVICTING
    assert subject.degraded(subject.begin(items=(other,))) == {"store_evicting"}
    assert subject.degraded(subject.begin()) == set()
    subject.store.trouble = Trouble.FULL  # of no concern to who reads
    assert subject.degraded(subject.begin(items=(other,))) == set()


def test_a_row_of_another_schema_is_named_as_a_default(subject: Subject) -> None:
    key = row_key(row_prefix("demo", "items", 1), subject.items[1])
    subject.store.inner.put([(key, b"of another length")]).result()
    fetch = subject.begin()
    assert subject.degraded(fetch) == {"items_default"}
    assert fetch.counts["items"] == RowCounts(fresh=2, default=1, wrong_schema=1)


def test_a_loading_that_does_not_suit_the_model_is_not_read(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Found at start it is an error; loaded later it must not fail the requests of a model that serves."""
    subject = make()
    subject.put_rows(WRONG_KIND, pl.DataFrame({"item_id": subject.items, "minutes": ["ten", "eleven", None]}), 2)
    subject.shared.look()
    for _ in range(3):
        fetch = subject.begin()
        assert subject.degraded(fetch) == {"items_default"}
        assert fetch.counts["items"] == RowCounts(default=3, wrong_schema=3)
        np.testing.assert_array_equal(subject.fill(fetch)[0], subject.catalogue.items.numeric[fetch.candidates])
    assert sum("takes 'minutes' as a number" in message for message in caplog.messages) == 1
    with pytest.raises(ConfigError, match="takes 'minutes' as a number"):
        VersionFeatures(subject.schema, subject.catalogue, subject.shared)


def test_the_artifacts_history_and_what_is_appended_are_one(subject: Subject) -> None:
    user = subject.users[0]
    packed = subject.features.stored_history(user)
    assert packed is not None
    last = int(packed.times[-1])
    events = (Event(subject.items[0], "click", last + 5), Event("never heard of", "like", last + 6))
    appended = subject.features.append(user, events)
    assert (appended.stored, appended.unknown, appended.confirmed) == (len(packed) + 2, ("never heard of",), True)
    again = Event(subject.catalogue.item_id(int(packed.rows[-1])), subject.schema.event_types[packed.events[-1]], last)
    assert subject.features.append(user, (again,)).stored == len(packed) + 2  # the log has it already
    fetch = subject.begin(user)
    history = subject.features.history(fetch)
    assert history is not None
    np.testing.assert_array_equal(history.rows, [*packed.rows, *subject.rows_of(subject.items[0]), UNKNOWN_ROW])
    assert history.times.tolist() == [*packed.times.tolist(), last + 5, last + 6]
    assert fetch.counts["histories"] == RowCounts(fresh=1)
    assert subject.features.history(subject.begin(user)) is history  # decoded once
    assert subject.features.user_ids(2) == [user, next(one for one in subject.catalogue.ids.users if one != user)]


def test_events_of_other_servers_and_versions(subject: Subject) -> None:
    raw = pack_events([RawEvent(subject.items[0], "bought", 5, {}), RawEvent(subject.items[1], "click", 6, {})])
    subject.store.append_elsewhere(history_key("demo", "somebody new"), raw).result()
    history = subject.features.history(subject.begin("somebody new"))
    assert history is not None
    assert history.times.tolist() == [6]  # this version has never heard of "bought"
    assert subject.features.history(subject.begin("nobody")) is None
    with pytest.raises(InvalidRequest, match="unknown event type"):
        subject.features.append("somebody new", (Event(subject.items[0], "bought"),))
    with pytest.raises(InvalidRequest):
        subject.features.append("", (Event(subject.items[0], "click"),))
    subject.store.away = Trouble.FULL
    with pytest.raises(StoreFailure):
        subject.features.append("somebody new", (Event(subject.items[0], "click"),))
    fetch = subject.begin("nobody at all")
    assert subject.features.history(fetch) is None
    assert fetch.counts["histories"] == RowCounts(default=1)


def test_two_versions_share_rows_and_histories(subject: Subject) -> None:
    subject.features.append("u", (Event(subject.items[0], "click", 5),))
    other = VersionFeatures(subject.schema, subject.catalogue, subject.shared)
    one, two = (features.stored_history("u") for features in (subject.features, other))
    assert one is not None
    assert two is not None
    assert one is not two
    assert one.times.tolist() == two.times.tolist() == [5]
    subject.begin()
    reads = subject.store.calls["get"]
    other.begin(subject.users[0], subject.items, False, None)
    assert subject.store.calls["get"] == reads
    kept = subject.shared.figures().histories.kept_bytes
    other.close()
    assert subject.shared.figures().histories.kept_bytes < kept
    assert subject.features.stored_history("u") is one


class Opened:
    """What waits behind `when_ready`."""

    def __init__(self, subject: Subject, fetch: Fetch, rows_too: bool) -> None:
        self.event, self.times = threading.Event(), 0
        subject.features.when_ready(fetch, rows_too, self._open)

    def _open(self) -> None:
        self.times += 1
        self.event.set()


def test_a_history_that_has_to_be_encoded_does_not_wait_for_rows(subject: Subject) -> None:
    subject.store.holds = {"get", "history"}
    fetch = subject.begin()
    encode, score = Opened(subject, fetch, rows_too=False), Opened(subject, fetch, rows_too=True)
    (history,) = (n for n, call in enumerate(subject.store.waiting) if call.kind == "history")
    subject.store.release(history)
    assert (encode.times, score.times) == (1, 0)
    subject.store.release()
    assert score.times == 0
    subject.store.release()
    assert (encode.times, score.times) == (1, 1)
    assert subject.features.when_rows(fetch) is None
    assert subject.degraded(fetch) == set()


def test_rows_that_come_while_they_are_waited_for_are_used(subject: Subject) -> None:
    subject.store.holds = {"get"}
    fetch = subject.begin()
    when, came = subject.features.when_rows(fetch), threading.Event()
    assert when is not None
    when(came.set)
    assert not came.is_set()
    while subject.store.waiting:
        subject.store.release()
    assert came.wait(FOREVER)
    assert subject.features.when_rows(fetch) is None
    assert subject.degraded(fetch) == set()


def test_a_store_that_never_answers_is_not_waited_for_longer_than_until(subject: Subject) -> None:
    subject.store.holds = {"get", "history"}
    began = time.perf_counter()
    fetch = subject.begin(seconds=0.05)
    for rows_too in (False, True):
        opened = Opened(subject, fetch, rows_too)
        assert opened.event.wait(FOREVER / 2)
        assert fetch.until is not None
        assert time.perf_counter() >= fetch.until
    assert subject.features.when_rows(fetch) is None
    assert subject.degraded(fetch) == {"items_default", "user_default", "history_default"}
    assert subject.features.when_rows(subject.begin(seconds=-1.0)) is None
    assert time.perf_counter() - began < FOREVER / 2
    subject.store.release_all()
    assert subject.degraded(fetch) == set()  # what came late is used if it is there by then


def test_asynchronous_rows_are_never_waited_for(make: Make) -> None:
    subject = make(Mode.ASYNC)
    subject.begin()
    subject.store.holds = {"get"}
    fetch = subject.begin(items=subject.catalogue.ids.items[4:9])
    assert Opened(subject, fetch, rows_too=True).times == 1
    assert subject.degraded(fetch) == {"items_default"}


def test_tables_are_found_when_the_store_begins_to_answer(
    artifact: Artifact, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_features, "FIRST_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(shared_features, "LOOK_SECONDS", 0.01)
    store = RemoteStore()
    store.away = Trouble.DOWN
    service = FeatureService(FeatureConfig(), store)
    service.start()
    features = VersionFeatures(artifact.schema, catalogue, service.of("demo"))
    assert features.shared.items.loaded is None
    meta = encode_meta(TableMeta(1, ITEMS))
    store.inner.put([(meta_key("demo", "items"), meta)]).result()
    store.away = None
    eventually(lambda: features.shared.items.loaded, "the table is found")
    service.close()


def test_a_table_that_cannot_be_read_does_not_stop_the_others(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the same model or of another one, whatever is wrong with it: a damaged description, or rows too wide."""
    monkeypatch.setattr(shared_features, "LOOK_SECONDS", 0.01)
    another = subject.service.of("another")
    subject.service.start()
    wide = RowSchema("items", "item_id", (RowColumn("v", ColumnKind.EMBEDDING, 4096),), version=3)
    assert 16 * wide.row_bytes > subject.shared.config.items.budget_mib * (1 << 20)
    for loading, bad in ((2, b"garbage"), (3, encode_meta(TableMeta(9, wide)))):
        subject.store.inner.put([(meta_key("demo", "items"), bad)]).result()
        again = encode_meta(TableMeta(loading, USERS))
        subject.store.inner.put([(meta_key(name, "users"), again) for name in ("demo", "another")]).result()
        for shared in (subject.shared, another):
            eventually(lambda s=shared, n=loading: s.figures().tables["users"].generation == n, "it is followed")  # type: ignore[misc]
    subject.store.inner.put([(meta_key("demo", "items"), encode_meta(TableMeta(4, ITEMS)))]).result()
    eventually(lambda: subject.shared.figures().tables["items"].generation == 4, "the table is read again")
    complaints = [message for message in caplog.messages if "garbage" in message or "row cache" in message]
    assert len(complaints) <= 2
