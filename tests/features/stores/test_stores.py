"""What every store promises, asked of each: in memory, on disk, in Redis and in a cluster of it."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rankd.features.stores.event_records import HEADER_BYTES, appended, counts_of, mark_of
from rankd.features.stores.feature_store import FeatureStore, HistoryRead, StoreFailure, Trouble
from rankd.features.stores.store_keys import history_key, row_key, row_prefix
from tests.features.stores.event_samples import identities, record, records

USER = history_key("shop", "ada")
MOST = 50


def test_what_was_put_is_there(store: FeatureStore) -> None:
    values = {b"a": b"1", b"b": b"", b"c": bytes(range(256)) * 40, b"\xff\x00 d": b"\x00\r\n$"}
    assert store.put(list(values.items())).result() is None
    asked = [b"c", b"none", b"b", b"\xff\x00 d", b"a", b"c"]
    assert store.get(asked).result() == [values.get(key) for key in asked]
    store.put([(b"a", b"2")]).result()
    assert store.get([b"a"]).result() == [b"2"]


def test_nothing_is_answered_with_nothing(store: FeatureStore) -> None:
    assert store.get([]).done()
    assert store.get([]).result() == []
    assert store.put([]).result() is None
    assert store.delete([]).result() is None
    assert list(store.keys(b"")) == []


def test_local_stores_answer_at_once(store: FeatureStore) -> None:
    if not store.local:
        return
    assert store.listening() == 0
    assert store.put([(b"a", b"1")]).done()
    assert store.get([b"a"]).done()
    assert store.append(USER, records(1), MOST).done()
    assert store.history(USER).done()


def test_large_batches(store: FeatureStore) -> None:
    prefix = row_prefix("shop", "items", 1)
    pairs = [(row_key(prefix, str(number)), number.to_bytes(4, "little") * 64) for number in range(5000)]
    store.put(pairs).result()
    random.Random(1).shuffle(pairs)
    asked = [key for key, _ in pairs] + [b"none"]
    assert store.get(asked).result() == [*(value for _, value in pairs), None]
    batches = list(store.keys(prefix))
    assert sorted(key for batch in batches for key in batch) == sorted(key for key, _ in pairs)
    assert max(map(len, batches)) < 5000
    store.delete(asked[:4990]).result()
    left = [key for batch in store.keys(prefix) for key in batch]
    assert sorted(left) == sorted(asked[4990:5000])


def test_keys_begin_with_the_prefix_as_it_is(store: FeatureStore) -> None:
    names = [b"a*b", b"a*bc", b"axb", b"a[1]", b"a1", b"a?", b"a\\", b"a", b"b", b"\xff", b"\xffa"]
    store.put([(name, b"1") for name in names]).result()
    for prefix in (b"", b"a", b"a*", b"a*b", b"a[", b"a[1]", b"a?", b"a\\", b"\xff", b"none"):
        found = sorted(key for batch in store.keys(prefix) for key in batch)
        assert found == sorted(name for name in names if name.startswith(prefix)), prefix


def test_delete_passes_over_what_is_not_there(store: FeatureStore) -> None:
    store.put([(b"a", b"1"), (b"b", b"2")]).result()
    store.delete([b"none", b"a", b"a"]).result()
    assert store.get([b"a", b"b"]).result() == [None, b"2"]


def test_exchange_writes_over_what_is_expected(store: FeatureStore) -> None:
    assert store.exchange(b"meta", b"", b"x").result() is False
    assert store.exchange(b"meta", None, b"one").result() is True
    assert store.exchange(b"meta", None, b"two").result() is False
    assert store.exchange(b"meta", b"two", b"three").result() is False
    assert store.get([b"meta"]).result() == [b"one"]
    assert store.exchange(b"meta", b"one", b"").result() is True
    assert store.exchange(b"meta", None, b"four").result() is False
    assert store.exchange(b"meta", b"", b"five").result() is True
    assert store.get([b"meta"]).result() == [b"five"]


def test_one_of_many_exchanges_wins(store: FeatureStore) -> None:
    together = threading.Barrier(8)

    def attempt(number: int) -> bool:
        together.wait()
        return store.exchange(b"meta", None, b"%d" % number).result()

    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(attempt, range(8)))
    assert won.count(True) == 1
    assert store.get([b"meta"]).result() == [b"%d" % won.index(True)]


def test_history_is_read_if_it_changed(store: FeatureStore) -> None:
    assert store.history(USER).result() == HistoryRead(changed=False)
    assert store.history(USER, bytes(HEADER_BYTES)).result() == HistoryRead(changed=True)
    header = store.append(USER, records(1, 2), MOST).result()
    first = store.history(USER).result()
    assert first == HistoryRead(changed=True, record=appended(None, records(1, 2), MOST))
    assert mark_of(first.record) == header
    assert store.history(USER, header).result() == HistoryRead(changed=False)
    newer = store.append(USER, records(3), MOST).result()
    second = store.history(USER, header).result()
    assert second.changed
    assert identities(second.record) == [1, 2, 3]
    assert store.history(USER, newer).result() == HistoryRead(changed=False)
    store.delete([USER]).result()
    assert store.history(USER, newer).result() == HistoryRead(changed=True)


def test_history_is_what_get_has_too(store: FeatureStore) -> None:
    store.append(USER, records(1, 2), MOST).result()
    (record_there,) = store.get([USER]).result()
    assert identities(record_there) == [1, 2]
    other = history_key("shop", "bob")
    store.put([(other, appended(None, records(7, 8), MOST))]).result()
    store.append(other, records(9), MOST).result()
    assert identities(store.history(other).result().record) == [7, 8, 9]
    assert sorted(key for batch in store.keys(b"rankd:h:shop:") for key in batch) == [USER, other]


def test_an_event_is_added_once(store: FeatureStore) -> None:
    once = store.append(USER, records(1, 2), MOST).result()
    assert store.append(USER, records(1, 2), MOST).result() == once
    assert store.append(USER, records(2, 2, 1), MOST).result() == once
    store.append(USER, record(2, 99) + record(3, 1) + record(3, 2), MOST).result()
    there = store.history(USER).result().record
    assert there == appended(appended(None, records(1, 2), MOST), record(3, 1), MOST)


def test_appending_nothing_makes_no_history(store: FeatureStore) -> None:
    assert store.append(USER, b"", MOST).result() == appended(None, b"", MOST)
    assert store.get([USER]).result() == [None]
    assert list(store.keys(b"")) == []


@pytest.mark.parametrize("batch", [1, 3, 7, 40])
def test_the_newest_stay(store: FeatureStore, batch: int) -> None:
    most, reference = 5, None
    for start in range(1, 80, batch):
        new = records(*range(start, start + batch))
        header = store.append(USER, new, most).result()
        reference = appended(reference, new, most)
        assert header == reference[:HEADER_BYTES]
    there = store.history(USER).result().record
    assert there == reference
    assert there is not None
    assert len(identities(there)) == most
    assert counts_of(there)[1] == counts_of(there)[0] + most


def test_concurrent_appends_lose_nothing(store: FeatureStore) -> None:
    together = threading.Barrier(8)

    def append(thread: int) -> None:
        together.wait()
        for number in range(25):
            identity = 1 + thread * 25 + number
            header = store.append(USER, records(identity), 500).result()
            read = store.history(USER).result()
            assert identity in identities(read.record)
            assert counts_of(read.record or b"")[1] >= counts_of(header)[1]

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(append, range(8)))
    there = store.history(USER).result().record
    assert sorted(identities(there)) == list(range(1, 201))
    assert there is not None
    assert counts_of(there) == (0, 200)


@pytest.mark.parametrize("value", [b"", b"x" * 10, b"x" * HEADER_BYTES, bytes(HEADER_BYTES + 64), b"\x01" + bytes(30)])
def test_what_is_no_history_is_not_appended_to(store: FeatureStore, value: bytes) -> None:
    store.put([(USER, value)]).result()
    with pytest.raises(StoreFailure) as failed:
        store.append(USER, records(1), MOST).result()
    assert failed.value.trouble is Trouble.BROKEN
    assert store.get([USER]).result() == [value]
    assert store.health().failures == {"broken": 1}
    assert store.health().up


def test_a_snapshot_counts(store: FeatureStore) -> None:
    store.put([(b"a", b"12345"), (b"b", b"123")]).result()
    store.get([b"a", b"none", b"b"]).result()
    health = store.health()
    assert health.up
    assert health.trouble is None
    assert (health.read_keys, health.read_bytes, health.written_bytes, health.recoveries) == (3, 8, 8, 0)
    assert health.failures == {}
