"""Loading histories: in the order of their times, no event twice, however often and wherever it is interrupted."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rankd.features.filling.history_records
from rankd.errors import DataError
from rankd.features.filling.history_loading import HistoryOptions, HistoryReport, count_histories, load_histories
from rankd.features.stores.event_records import RawEvent, counts_of, hash_name, pack_events, unpack_events
from rankd.features.stores.feature_store import FeatureStore, StoreFailure
from rankd.features.stores.memory_store import MemoryStore
from rankd.features.stores.store_keys import hash_id, history_key
from tests.features.filling.small_tables import TroubledStore, failing_at

VIEWS = HistoryOptions(event="view", in_flight=3)


def load(store: FeatureStore, path: Path, frame: pl.DataFrame, options: HistoryOptions = VIEWS) -> HistoryReport:
    """Load a frame by way of a file."""
    frame.write_parquet(path)
    return load_histories(store, "m", path, options)


def record_of(store: FeatureStore, user: str) -> bytes | None:
    return store.history(history_key("m", user)).result().record


def events_of(store: FeatureStore, user: str) -> Any:
    record = record_of(store, user)
    assert record is not None
    return unpack_events(record)


def log_frame(events: int, users: int = 20, first: int = 0) -> pl.DataFrame:
    """Events of some users in no order, two columns of values with gaps."""
    random = np.random.default_rng(first)
    return pl.DataFrame(
        {
            "user_id": random.integers(0, users, events).astype(str),
            "item_id": random.integers(0, 30, events),
            "time": first + random.integers(0, 5000, events),
            "event": random.choice(["view", "like"], events),
            "stars": pl.Series(random.integers(1, 6, events)).replace(3, None),
            "seconds": random.random(events),
        }
    )


def test_events_are_stored_by_time_with_their_values(store: FeatureStore, tmp_path: Path) -> None:
    frame = log_frame(600)
    report = load(store, tmp_path / "log.parquet", frame)
    assert (report.users, report.events, report.added) == (20, 600, 600)
    assert (report.known, report.older, report.cut, report.incomplete) == (0, 0, 0, 0)
    assert count_histories(store, "m") == 20
    for (user,), mine in frame.sort("time", maintain_order=True).group_by("user_id"):
        found = events_of(store, str(user))
        assert found["item"].tolist() == [hash_id(str(item)) for item in mine["item_id"]]
        assert found["time"].tolist() == mine["time"].to_list()
        assert found["event"].tolist() == [hash_name(event) for event in mine["event"]]
        for values, stars, seconds in zip(found["values"], mine["stars"], mine["seconds"], strict=True):
            given = [(hash_name("stars"), stars)] if stars is not None else []
            expected = [*given, (hash_name("seconds"), np.float32(seconds)), (0, 0), (0, 0), (0, 0)][:4]
            assert values.tolist() == expected


def test_twice_is_the_same_as_once(store: FeatureStore, tmp_path: Path) -> None:
    frame = log_frame(600)
    load(store, tmp_path / "log.parquet", frame)
    records = {user: record_of(store, user) for user in frame["user_id"].unique()}
    again = load(store, tmp_path / "log.parquet", frame)
    assert (again.added, again.known, again.older) == (0, 600, 0)
    assert records == {user: record_of(store, user) for user in records}
    longer = pl.concat([frame, log_frame(100, first=10_000)])
    assert load(store, tmp_path / "log.parquet", longer).added == 100


def test_the_newest_events_stay(store: FeatureStore, tmp_path: Path) -> None:
    frame = log_frame(400, users=2)
    kept = HistoryOptions(keep=50)
    report = load(store, tmp_path / "log.parquet", frame, kept)
    assert (report.added, report.cut) == (100, 300)
    newest = frame.filter(user_id="0").sort("time", maintain_order=True)["time"].tail(50).to_list()
    assert events_of(store, "0")["time"].tolist() == newest
    assert load(store, tmp_path / "log.parquet", frame, kept).known == 100


def test_what_happened_meanwhile_stays_at_the_end(store: FeatureStore, tmp_path: Path) -> None:
    frame = log_frame(100, users=1)
    load(store, tmp_path / "log.parquet", frame, HistoryOptions(keep=50))
    live = pack_events([RawEvent("x", "view", 20_000 + n, {}) for n in range(10)])
    store.append(history_key("m", "0"), live, 50).result()
    report = load(store, tmp_path / "log.parquet", frame, HistoryOptions(keep=50))
    assert (report.added, report.known, report.older) == (0, 40, 10)
    assert events_of(store, "0")["time"].tolist()[-10:] == list(range(20_000, 20_010))


def test_same_events_of_one_second_are_several(tmp_path: Path) -> None:
    store = MemoryStore()
    frame = pl.DataFrame({"user_id": ["u"] * 5, "item_id": ["a", "a", "b", "a", "a"], "time": [7, 7, 7, 7, 8]})
    assert load(store, tmp_path / "log.parquet", frame).added == 5
    assert len(set(events_of(store, "u")["id"].tolist())) == 5
    assert load(store, tmp_path / "log.parquet", frame).known == 5
    assert load(store, tmp_path / "log.parquet", frame, HistoryOptions(event="like")).added == 1  # of the newest second


def test_times_ids_and_names_of_other_types(tmp_path: Path) -> None:
    store = MemoryStore()
    moment = datetime(2026, 1, 2, 3, 4, 5, 600_000, tzinfo=UTC)
    frame = pl.DataFrame(
        {
            "user_id": pl.Series([1, None, 1, 1]),
            "item_id": pl.Series(["a", "a", None, "b"], dtype=pl.Categorical),
            "time": [moment, moment, moment, moment],
            "event": pl.Series(["like", "like", "like", None], dtype=pl.Enum(["like"])),
        }
    )
    report = load(store, tmp_path / "log.parquet", frame)
    assert (report.users, report.added, report.incomplete, report.events) == (1, 2, 2, 4)
    found = events_of(store, "1")
    assert found["time"].tolist() == [int(moment.timestamp())] * 2
    assert found["event"].tolist() == [hash_name("like"), hash_name("view")]


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"item_id": None}, VIEWS, "column 'item_id' is missing; there are"),
        ({"time": pl.Series([1.5])}, VIEWS, "time is Float64; it has to be a timestamp or whole seconds"),
        ({"user_id": pl.Series([1.5])}, VIEWS, "column 'user_id' is Float64; ids are texts or whole numbers"),
        ({"event": None}, HistoryOptions(), "has no column 'event'; say with --event NAME what its rows are"),
        ({"event": pl.Series([None], dtype=pl.String)}, HistoryOptions(), "an event of user 'u' has no name"),
        (
            {"stars": pl.Series(["1"])},
            HistoryOptions(values=("stars",)),
            "'stars' is no numeric column; there are none",
        ),
        ({}, HistoryOptions(values=("star",)), "there are stars. Did you mean 'stars'"),
        ({str(n): pl.Series([n]) for n in range(4)}, VIEWS, r"5 columns of values .*at most 4; choose with --values"),
    ],
)
def test_a_file_that_does_not_fit(change: dict[str, Any], options: HistoryOptions, words: str, tmp_path: Path) -> None:
    frame = pl.DataFrame({"user_id": ["u"], "item_id": ["i"], "time": [1], "event": ["view"], "stars": [1]})
    frame = frame.with_columns(**{name: values for name, values in change.items() if values is not None})
    frame = frame.drop(name for name, values in change.items() if values is None)
    with pytest.raises(DataError, match=words):
        load(MemoryStore(), tmp_path / "log.parquet", frame, options)


def test_values_can_be_chosen(tmp_path: Path) -> None:
    store = MemoryStore()
    load(store, tmp_path / "log.parquet", log_frame(10, users=1), HistoryOptions(values=("seconds",)))
    assert set(events_of(store, "0")["values"]["name"][:, 0].tolist()) == {hash_name("seconds")}
    assert not events_of(store, "0")["values"]["name"][:, 1].any()


@settings(deadline=None, max_examples=40)
@given(
    data=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 4)), max_size=30),
    keep=st.integers(1, 5),
    part=st.integers(1, 40),
)
def test_parts_are_the_same_as_the_whole(
    tmp_path_factory: pytest.TempPathFactory, data: list[tuple[int, int, int]], keep: int, part: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "log.parquet"
    frame = pl.DataFrame(data, {"user_id": pl.Int64, "item_id": pl.Int64, "time": pl.Int64}, orient="row")
    whole, parts = MemoryStore(), MemoryStore()
    options = HistoryOptions(event="view", keep=keep, in_flight=2)
    expected = load(whole, path, frame, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rankd.features.filling.history_records, "PART_EVENTS", part)
        report = load(parts, path, frame, options)
    assert (report.added, report.cut, report.users) == (expected.added, expected.cut, expected.users)
    for user in map(str, range(4)):
        assert record_of(parts, user) == record_of(whole, user)


def test_an_interrupted_load_is_run_again(store: FeatureStore, tmp_path: Path) -> None:
    frame, path = log_frame(600), tmp_path / "log.parquet"
    frame.write_parquet(path)

    def progress(done: int, total: int, line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_histories(store, "m", path, VIEWS, progress)
    report = load(store, path, frame)
    assert report.added + report.known == 600
    assert 0 < report.known < 600
    assert sum(counts_of(record_of(store, user) or b"")[1] for user in frame["user_id"].unique()) == 600


def test_a_store_in_trouble_is_asked_again(tmp_path: Path) -> None:
    class Forgetful(TroubledStore):
        def append(self, key: bytes, records: bytes, most: int) -> Any:
            done = super().append(key, records, most)  # it happened, and the answer is lost
            failed = self.put([])
            return done if failed.exception() is None else failed

    frame = log_frame(100)
    store = Forgetful(failing_at(2, 3, 9))
    assert load(store, tmp_path / "log.parquet", frame).added == 100
    assert sum(len(events_of(store, user)) for user in frame["user_id"].unique()) == 100
    store = Forgetful(failing_at(*range(5, 1000)))
    with pytest.raises(StoreFailure, match=r"The events of 3 users are in the store; run the same command again"):
        load(store, tmp_path / "log.parquet", frame, HistoryOptions(in_flight=3, patience_seconds=0.1))
