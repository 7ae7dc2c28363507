"""The LMDB environments that are open in this process: one for each folder, however many stores share it.

LMDB must not open a folder twice in a process: closing one would let go of the locks of the other. A forked child must
not touch what its parent opened, for its places in the table of readers are the parent's; nor can it open it again.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

import lmdb

from rankd.errors import ConfigError

MAX_READERS = 1024  # read transactions at one time, of all processes


@dataclass(slots=True)
class _Shared:
    environment: lmdb.Environment
    process: int
    holders: int


_open: dict[str, _Shared] = {}  # by real path
_lock = threading.Lock()  # guards `_open`


def borrow_environment(folder: Path, map_bytes: int) -> lmdb.Environment:
    """The environment of a folder, opened if this process has not. Whoever opens it first decides on `map_bytes`.

    Raises:
        ConfigError: the folder cannot be made or written, what is in it is not of LMDB, or it was open before a fork.
    """
    with _lock:
        path = os.path.realpath(folder)
        shared = _open.get(path)
        if shared is None:
            shared = _open[path] = _Shared(_opened(folder, map_bytes), os.getpid(), 0)
        if shared.process != os.getpid():
            raise ConfigError(
                f"store url 'lmdb:{folder}': it was open when this process was forked; open it after the fork only, or "
                "spawn processes instead"
            )
        shared.holders += 1
        return shared.environment


def return_environment(folder: Path) -> None:
    """Nothing is asked of a borrowed environment any more; the last one closes it."""
    with _lock:
        path = os.path.realpath(folder)
        shared = _open[path]
        shared.holders -= 1
        if shared.holders == 0:
            del _open[path]
            shared.environment.close()


def _opened(folder: Path, map_bytes: int) -> lmdb.Environment:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        environment = lmdb.open(
            str(folder), map_size=map_bytes, max_readers=MAX_READERS, max_spare_txns=16, readahead=False
        )
        environment.reader_check()  # the places of readers that were killed
    except (lmdb.Error, OSError) as error:
        raise ConfigError(
            f"store url 'lmdb:{folder}': {error}; it has to be a folder that this user may write to, empty or "
            "written by LMDB. Name another one, or restore this one from a copy"
        ) from error
    return environment
