"""The store on disk: shared by processes, whole after they are killed, and clear about folders that cannot be used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rankd.errors import ConfigError
from rankd.features.stores.feature_store import HistoryRead, StoreFailure, Trouble
from rankd.features.stores.lmdb_store import LmdbStore
from rankd.features.stores.store_keys import history_key
from tests.features.stores.event_samples import identities, records

USER = history_key("shop", "ada")
MAP_BYTES = 1 << 30
# argv: folder, first id, last id. Appends one event after the other and says so when each is acknowledged.
WRITER = """
import sys
from pathlib import Path
from rankd.features.stores.lmdb_store import LmdbStore
from rankd.features.stores.store_keys import history_key
store = LmdbStore(Path(sys.argv[1]), 1 << 30)
for identity in range(int(sys.argv[2]), int(sys.argv[3])):
    store.append(history_key("shop", "ada"), bytes(56) + identity.to_bytes(8, "little"), 100_000).result()
    print(identity, flush=True)
"""


def writer(folder: Path, first: int, last: int) -> subprocess.Popen[str]:
    """Another process that appends."""
    command = [sys.executable, "-c", WRITER, str(folder), str(first), str(last)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that is not there yet."""
    return tmp_path / "deep" / "store"


def test_another_process_is_seen_at_once(folder: Path) -> None:
    store = LmdbStore(folder, MAP_BYTES)
    header = store.append(USER, records(1), 1000).result()
    with writer(folder, 2, 40) as process:
        assert process.stdout is not None
        for line in process.stdout:
            assert int(line) in identities(store.history(USER).result().record)
    assert process.returncode == 0
    read = store.history(USER, header).result()
    assert read.changed
    assert identities(read.record) == list(range(1, 40))
    store.close()


def test_processes_that_append_together_lose_nothing(folder: Path) -> None:
    with writer(folder, 1, 100) as one, writer(folder, 1000, 1100) as other:
        one.communicate()
        other.communicate()
    store = LmdbStore(folder, MAP_BYTES)
    assert sorted(identities(store.history(USER).result().record)) == [*range(1, 100), *range(1000, 1100)]
    store.close()


def test_what_was_acknowledged_survives_a_kill(folder: Path) -> None:
    acknowledged: list[int] = []
    store = LmdbStore(folder, MAP_BYTES)
    for start in (1, 100_001):
        with writer(folder, start, start + 99_000) as process:
            assert process.stdout is not None
            acknowledged += [int(process.stdout.readline()) for _ in range(60)]
            process.kill()
            acknowledged += map(int, process.stdout.read().split())
        assert process.returncode < 0
        store.append(USER, records(start + 99_999), 100_000).result()
        acknowledged.append(start + 99_999)
    store.close()
    store = LmdbStore(folder, MAP_BYTES)
    there = identities(store.history(USER).result().record)
    assert set(acknowledged) <= set(there)
    assert len(there) - len(acknowledged) <= 2  # those whose acknowledgement did not come out
    store.close()


def test_a_full_map_says_what_to_do(folder: Path) -> None:
    store = LmdbStore(folder, 1 << 20)
    store.put([(b"a", b"1")]).result()
    with pytest.raises(StoreFailure, match="map_gib higher") as failed:
        store.put([(b"b%d" % number, bytes(4000)) for number in range(1000)]).result()
    assert failed.value.trouble is Trouble.FULL
    assert store.get([b"a", b"b0"]).result() == [b"1", None]
    assert store.health().failures == {"full": 1}
    store.put([(b"a", b"2")]).result()
    assert store.get([b"a"]).result() == [b"2"]
    store.close()


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(ConfigError, match=r"lmdb:.*file.*has to be a folder"):
        LmdbStore(tmp_path / "file", MAP_BYTES)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "data.mdb").write_bytes(b"not what LMDB writes" * 1000)
    for _ in range(2):
        with pytest.raises(ConfigError, match="written by LMDB"):
            LmdbStore(broken, MAP_BYTES)


def test_stores_of_one_folder_share_it(folder: Path) -> None:
    one, other = LmdbStore(folder, MAP_BYTES), LmdbStore(folder / ".." / "store", MAP_BYTES)
    one.put([(b"a", b"1")]).result()
    assert other.get([b"a"]).result() == [b"1"]
    one.close()
    one.close()
    assert other.get([b"a"]).result() == [b"1"]
    other.close()
    again = LmdbStore(folder, MAP_BYTES)
    assert again.get([b"a"]).result() == [b"1"]
    again.close()


def test_nothing_is_answered_after_close(folder: Path) -> None:
    store = LmdbStore(folder, MAP_BYTES)
    store.close()
    for future in (
        store.get([b"a"]),
        store.put([(b"a", b"1")]),
        store.append(USER, records(1), 5),
        store.history(USER),
    ):
        assert isinstance(future.exception(), StoreFailure)
    with pytest.raises(StoreFailure, match="closed"):
        list(store.keys(b""))
    assert not store.health().up


def test_a_key_that_lmdb_does_not_take(folder: Path) -> None:
    store = LmdbStore(folder, MAP_BYTES)
    with pytest.raises(StoreFailure) as failed:
        store.put([(b"k" * 512, b"1")]).result()
    assert failed.value.trouble is Trouble.BROKEN
    store.close()


FORK = """
import os, sys
from pathlib import Path
from rankd.errors import ConfigError
from rankd.features.stores.feature_store import StoreFailure
from rankd.features.stores.lmdb_store import LmdbStore
store = LmdbStore(Path(sys.argv[1]), 1 << 30)
store.put([(b"a", b"1")]).result()
child = os.fork()
if child == 0:
    inherited = store.get([b"a"]).exception()
    try:
        LmdbStore(Path(sys.argv[1]), 1 << 30)
    except ConfigError as error:
        refused = "forked" in str(error)
    other = LmdbStore(Path(sys.argv[1]) / "other", 1 << 30)
    other.put([(b"b", b"2")]).result()
    other.close()
    store.close()
    os._exit(0 if isinstance(inherited, StoreFailure) and refused else 1)
_, status = os.waitpid(child, 0)
store.put([(b"c", b"3")]).result()
assert store.get([b"a", b"c"]).result() == [b"1", b"3"]
store.close()
sys.exit(status)
"""


def test_a_forked_process_is_refused(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FORK, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unchanged_histories_are_not_read(folder: Path) -> None:
    store = LmdbStore(folder, MAP_BYTES)
    header = store.append(USER, records(*range(1, 100)), 1000).result()
    assert store.history(USER, header).result() == HistoryRead(changed=False)
    assert (store.health().read_keys, store.health().read_bytes) == (1, 0)
    store.close()
