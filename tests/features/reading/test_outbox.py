"""The outbox: what it took is on the disk, is delivered in order however often that fails, and is forgotten in time."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from rankd.errors import ConfigError, StoreFailure, Trouble
from rankd.features.reading import outbox as module
from rankd.features.reading.outbox import OWN_TRY_SECONDS, Outbox
from tests.features.reading.remote_store import RemoteStore
from tests.features.stores.event_samples import identities, records
from tests.features.stores.redis_server import eventually

KEEP_SECONDS = 600.0
Start = Callable[..., Outbox]


@pytest.fixture(autouse=True)
def awake(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for work more often, and forgets whenever it has none."""
    monkeypatch.setattr(module, "WAKE_SECONDS", 0.002)
    monkeypatch.setattr(module, "FORGET_EVERY_SECONDS", -1.0)


@pytest.fixture
def now() -> list[float]:
    return [1_000_000.0]


@pytest.fixture
def store() -> RemoteStore:
    return RemoteStore()


@contextmanager
def opened(folder: Path, store: RemoteStore, now: list[float], start: bool = True) -> Iterator[Outbox]:
    outbox = Outbox(folder / "outbox", store, KEEP_SECONDS, lambda: now[0])
    if start:
        outbox.start()
    try:
        yield outbox
    finally:
        outbox.close()


def stored(store: RemoteStore, key: bytes) -> list[int]:
    return identities(store.inner.history(key).result().record)


def on_disk(outbox: Outbox) -> list[float]:
    """When each append that is kept was delivered, 0 for those that are not, in the order of their numbers."""
    with outbox._writing:  # it may make the map larger, and nobody may read then
        return [entry[0] for _, entry in outbox._entries()]


def test_what_is_older_than_its_own_try_is_delivered_in_order(
    tmp_path: Path, store: RemoteStore, now: list[float]
) -> None:
    store.away = Trouble.DOWN
    with opened(tmp_path, store, now) as outbox:
        numbers = [outbox.add(b"rankd:h:m:u", records(event), 100) for event in (3, 1, 2)]
        assert numbers == [1, 2, 3]
        outbox.add(b"rankd:h:m:v", records(9), 100)
        assert outbox.undelivered == 4
        assert outbox.undelivered_of(b"rankd:h:m:u") == [records(3), records(1), records(2)]
        assert outbox.undelivered_of(b"nobody") == []
        store.away = None  # whoever added them may be trying yet
        now[0] += 0.9 * OWN_TRY_SECONDS
        outbox.delivered(2)
        outbox.delivered(2)
        assert outbox.undelivered_of(b"rankd:h:m:u") == [records(3), records(2)]
        assert stored(store, b"rankd:h:m:u") == []
        now[0] += 0.2 * OWN_TRY_SECONDS
        eventually(lambda: outbox.undelivered == 0, "all is delivered")
        assert stored(store, b"rankd:h:m:u") == [3, 2]
        assert stored(store, b"rankd:h:m:v") == [9]
        assert outbox.undelivered_of(b"rankd:h:m:u") == []


def test_what_is_pending_survives_and_what_is_delivered_is_not_pending(
    tmp_path: Path, store: RemoteStore, now: list[float]
) -> None:
    with opened(tmp_path, store, now, start=False) as outbox:
        for event in range(1, 6):
            outbox.add(b"u", records(event), 100)
        outbox.delivered(2)
        outbox.delivered(4)
    with opened(tmp_path, store, now, start=False) as outbox:
        assert outbox.undelivered == 3
        assert outbox.undelivered_of(b"u") == [records(event) for event in (1, 3, 5)]
        assert outbox.add(b"u", records(6), 100) == 6
        assert [moment > 0 for moment in on_disk(outbox)] == [False, True, False, True, False, False]
    with opened(tmp_path, store, now) as outbox:  # what is from before is due at once
        eventually(lambda: stored(store, b"u")[:3] == [1, 3, 5], "the old ones are delivered")
        now[0] += 2 * OWN_TRY_SECONDS
        eventually(lambda: outbox.undelivered == 0, "all is delivered")
        eventually(lambda: all(on_disk(outbox)), "that is noted")
    assert stored(store, b"u") == [1, 3, 5, 6]


def test_a_store_that_was_away_is_given_everything_again(tmp_path: Path, store: RemoteStore, now: list[float]) -> None:
    with opened(tmp_path, store, now) as outbox:
        for event in (1, 2, 3):
            store.append(b"u", records(event), 100).result()
            outbox.delivered(outbox.add(b"u", records(event), 100))
        store.away = Trouble.DOWN
        outbox.add(b"u", records(4), 100)
        store.inner.delete([b"u"]).result()  # it comes back with nothing
        store.come_back()
        eventually(lambda: sorted(stored(store, b"u")) == [1, 2, 3, 4], "all is given again")
        eventually(lambda: outbox.undelivered == 0, "it is confirmed")
        appends = store.calls["append"]
        store.come_back()  # with everything
        eventually(lambda: store.calls["append"] == appends + 4, "it is given again")
        looks = store.calls["health"]
        eventually(lambda: store.calls["health"] > looks + 10, "it goes on")
        assert store.calls["append"] == appends + 4  # once
        assert sorted(stored(store, b"u")) == [1, 2, 3, 4]


def test_a_store_that_goes_away_while_it_is_given_everything_is_given_it_again(
    tmp_path: Path, store: RemoteStore, now: list[float]
) -> None:
    with opened(tmp_path, store, now) as outbox:
        for event in (1, 2, 3):
            outbox.delivered(outbox.add(b"u", records(event), 100))
        store.holds = {"append"}
        store.come_back()
        store.wait_for(1)
        store.release()
        store.wait_for(1)
        store.take().fail()
        store.wait_for(1)
        store.release_all()
        eventually(lambda: stored(store, b"u") == [1, 2, 3], "all is given again")


def test_a_full_disk_takes_nothing_and_is_no_end(
    tmp_path: Path, store: RemoteStore, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pending appends leave when the store takes them, though to note that takes room on the disk."""
    monkeypatch.setattr(module, "MAP_BYTES", 128 << 10)
    monkeypatch.setattr(module, "MORE_BYTES", 64 << 10)
    store.away = Trouble.DOWN
    with opened(tmp_path, store, now) as outbox:
        added, full = 0, None
        while full is None:
            try:
                outbox.add(b"u%d" % added, records(added + 1), 100)
                added += 1
            except StoreFailure as failure:
                full = failure
        assert "takes no more events" in str(full)
        assert full.trouble is Trouble.FULL
        assert outbox.undelivered == added > 10
        assert outbox.undelivered_of(b"u%d" % added) == []
        store.away = None
        now[0] += 2 * OWN_TRY_SECONDS
        eventually(lambda: outbox.undelivered == 0, "all is delivered")
        assert [stored(store, b"u%d" % number) for number in range(added)] == [[n + 1] for n in range(added)]
        now[0] += 2 * KEEP_SECONDS
        eventually(lambda: on_disk(outbox) == [], "all is forgotten")
        store.away = Trouble.DOWN
        for number in range(added):  # there is room again
            outbox.add(b"again", records(number + 1), 100)
        assert len(on_disk(outbox)) == added


def test_a_disk_that_cannot_be_written_is_a_failure_of_the_store(
    tmp_path: Path, store: RemoteStore, now: list[float]
) -> None:
    with opened(tmp_path, store, now, start=False) as outbox:
        pass
    with pytest.raises(StoreFailure, match="takes no more events"):
        outbox.add(b"u", records(1), 100)
    assert outbox.undelivered == 0


def test_a_key_that_takes_no_events_does_not_hold_up_others(
    tmp_path: Path, store: RemoteStore, now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    store.inner.put([(b"bad", b"no history")]).result()
    with opened(tmp_path, store, now) as outbox:
        outbox.add(b"bad", records(1), 100)
        outbox.add(b"u", records(2), 100)
        now[0] += 2 * OWN_TRY_SECONDS
        eventually(lambda: stored(store, b"u") == [2], "the one behind it is delivered")
        appends = store.calls["append"]
        eventually(lambda: store.calls["append"] > appends + 5, "the other is tried again and again")
        assert outbox.undelivered_of(b"bad") == [records(1)]
        assert sum("wait for the store" in message for message in caplog.messages) == 1
        now[0] += 2 * KEEP_SECONDS
        eventually(lambda: on_disk(outbox) == [0.0], "what was delivered behind it is forgotten")
        outbox.delivered(outbox.add(b"u", records(3), 100))
        store.come_back()  # nor does it hold up what is given again
        eventually(lambda: stored(store, b"u") == [2, 3], "it is given again")
        store.inner.delete([b"bad"]).result()
        eventually(lambda: outbox.undelivered == 0, "it is delivered in the end")


def test_what_is_old_is_forgotten_and_what_is_young_stays(
    tmp_path: Path, store: RemoteStore, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FORGET_EVERY_SECONDS", 5.0)
    monkeypatch.setattr(module, "AT_ONCE", 50)
    with opened(tmp_path, store, now, start=False) as outbox:

        def add(count: int, deliver: bool = True) -> None:
            for number in [outbox.add(b"u", records(event + 1), 100) for event in range(count)]:
                if deliver:
                    outbox.delivered(number)
            outbox._write_confirmed()

        def forgotten() -> list[float]:
            outbox._forget_old()
            return [moment - 1_000_000.0 for moment in on_disk(outbox)]

        assert forgotten() == []
        add(500)  # many pages
        now[0] += KEEP_SECONDS
        add(1)
        assert forgotten() == [0.0] * 500 + [KEEP_SECONDS]  # they are to be kept for so long
        now[0] += 1
        add(2, deliver=False)
        add(1)
        assert forgotten() == [KEEP_SECONDS, -1_000_000.0, -1_000_000.0, KEEP_SECONDS + 1]
        now[0] += KEEP_SECONDS
        assert forgotten() == [-1_000_000.0, -1_000_000.0, KEEP_SECONDS + 1]
        now[0] += 1
        assert forgotten() == [-1_000_000.0, -1_000_000.0]
        outbox.delivered(502)
        outbox.delivered(503)
        outbox._write_confirmed()
        now[0] += KEEP_SECONDS + 1
        assert forgotten() == []
        assert forgotten() == []


def test_a_folder_has_one_owner(tmp_path: Path, store: RemoteStore, now: list[float]) -> None:
    with opened(tmp_path, store, now):
        for _ in range(2):
            with pytest.raises(ConfigError, match="another server uses this outbox"):
                Outbox(tmp_path / "outbox", store, KEEP_SECONDS)
    with opened(tmp_path, store, now):
        pass
    (tmp_path / "a file").touch()
    with pytest.raises(ConfigError, match="cannot be used"):
        Outbox(tmp_path / "a file", store, KEEP_SECONDS)


def test_a_request_does_not_wait_for_the_disk(tmp_path: Path, store: RemoteStore, now: list[float]) -> None:
    """Whoever reads what is pending, or confirms, while another append is being synced."""
    with opened(tmp_path, store, now, start=False) as outbox:
        outbox.add(b"u", records(1), 100)
        with ThreadPoolExecutor(1) as pool, outbox._writing:
            slow = pool.submit(outbox.add, b"u", records(2), 100)
            assert outbox.undelivered_of(b"u") == [records(1)]
            outbox.delivered(1)
            assert not slow.done()
        assert slow.result(20) == 2


def test_many_threads_lose_nothing(tmp_path: Path, store: RemoteStore, now: list[float]) -> None:
    store.away = Trouble.DOWN
    with opened(tmp_path, store, now) as outbox:

        def add(thread: int) -> None:
            for event in range(20):
                number = outbox.add(b"u%d" % thread, records(thread * 100 + event + 1), 1000)
                if event % 3 == 0:
                    outbox.delivered(number)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(add, range(4)))
        assert outbox.undelivered == 4 * 13
        store.come_back()
        eventually(lambda: outbox.undelivered == 0, "all is delivered")
        for thread in range(4):
            expected = [thread * 100 + event + 1 for event in range(20)]
            eventually(lambda t=thread, e=expected: sorted(stored(store, b"u%d" % t)) == e, "it is there")  # type: ignore[misc]


KILLED = """
import sys
from pathlib import Path
from rankd.features.reading.outbox import Outbox
from tests.features.reading.remote_store import RemoteStore
from tests.features.stores.event_samples import records

outbox = Outbox(Path(sys.argv[1]), RemoteStore(), 600.0)
for event in (1, 2, 3):
    outbox.add(b"u", records(event), 100)
outbox.delivered(1)
print("added", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_server_took_is_delivered_by_the_next_one(
    tmp_path: Path, store: RemoteStore, now: list[float]
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "outbox")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"added\n"
        with pytest.raises(ConfigError, match="another server"):
            Outbox(tmp_path / "outbox", store, KEEP_SECONDS)
        server.send_signal(signal.SIGKILL)
    store.append_elsewhere(b"u", records(1))  # this one had arrived
    with opened(tmp_path, store, now) as outbox:
        eventually(lambda: outbox.undelivered == 0, "all is delivered")
    assert stored(store, b"u") == [1, 2, 3]


def test_closing_does_not_wait_for_a_store_that_is_away(tmp_path: Path, store: RemoteStore, now: list[float]) -> None:
    store.away = Trouble.DOWN
    with opened(tmp_path, store, now) as outbox:
        outbox.add(b"u", records(1), 100)
    assert not any(thread.name == "rankd-outbox" for thread in threading.enumerate())
    with opened(tmp_path, store, now, start=False) as outbox:
        assert on_disk(outbox) == [0.0]
