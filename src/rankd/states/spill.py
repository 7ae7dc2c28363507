"""The tier on disk: states that had to leave memory, one file a user, read through memory maps and verified.

    <folder>/<model>/<version>-<identity>/<2 hex>/<32 hex of the user id>.state

    8 bytes magic | 4 bytes length of the header | header (msgpack) | 32 bytes SHA-256 of header and arrays | arrays

A file is written beside its place and renamed, so it is there whole or not at all; one that was cut or changed is
counted, removed, and the state computed anew. `identity` names the artifact's checksum, the target and the storage:
states of another model are never looked at.
"""

from __future__ import annotations

import logging
import mmap
import os
import shutil
import threading
from collections import OrderedDict
from hashlib import blake2b, sha256
from pathlib import Path

import msgspec
import numpy as np

from rankd.errors import ConfigError
from rankd.observe.state_metrics import SpillCounts
from rankd.types import Array

log = logging.getLogger("rankd")
MAGIC = b"rkdstat1"
SUFFIX = ".state"
UNFINISHED = ".part"
LENGTH_BYTES, DIGEST_BYTES = 4, 32


class SpilledHeader(msgspec.Struct, frozen=True, array_like=True):
    """What a state is of: user (`id_bytes`), fingerprints, lengths a block, room in tokens, bytes of its arrays."""

    user: bytes
    history_mark: bytes
    tokens_mark: bytes
    lengths: tuple[int, ...]
    room: int
    size_bytes: int


class SpillTier:
    """Files of one model version under a byte budget; the oldest go first. Thread-safe.

    Raises:
        ConfigError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, model: str, version: str, identity: str, budget_bytes: int) -> None:
        self._folder, self._budget_bytes = folder / model / f"{version}-{identity}", budget_bytes
        self._lock = threading.Lock()
        self._sizes: OrderedDict[Path, int] = OrderedDict()
        self._written = self._restored = self._corrupt = self._failed = self._used_bytes = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_others(version)
            self._read_folder()
        except OSError as error:
            raise ConfigError(f"states.spill: cannot use '{folder}': {error.strerror or error}") from error

    def counts(self) -> SpillCounts:
        """A snapshot."""
        with self._lock:
            return SpillCounts(
                self._written, self._restored, self._corrupt, self._failed, len(self._sizes), self._used_bytes
            )

    def write(self, header: SpilledHeader, content: Array) -> None:
        """Keep a state, (bytes,) uint8. A disk that is full or broken is counted and logged, never an error."""
        head = msgspec.msgpack.encode(header)
        size = len(MAGIC) + LENGTH_BYTES + len(head) + DIGEST_BYTES + content.nbytes
        path = self._path_of(header.user)
        if size > self._budget_bytes:
            return
        digest = sha256(head)
        digest.update(content.data)
        part = path.with_suffix(f".{threading.get_ident()}{UNFINISHED}")
        self._reserve(path, size)
        try:
            path.parent.mkdir(exist_ok=True)
            with part.open("wb") as file:
                file.write(MAGIC + len(head).to_bytes(LENGTH_BYTES, "little") + head + digest.digest())
                file.write(content.data)
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            with self._lock:
                self._failed += 1
                self._used_bytes -= size
            log.warning("a state could not be written to %s: %s", path, error.strerror or error)
            return
        with self._lock:
            self._written += 1
            self._used_bytes -= self._sizes.pop(path, 0)  # somebody else wrote the same user's meanwhile
            self._sizes[path] = size

    def read(self, user: str) -> tuple[SpilledHeader, Array] | None:
        """A user's state, (bytes,) uint8 over a memory map; None if there is none, or none that can be trusted."""
        path = self._path(user)
        with self._lock:
            if path not in self._sizes:
                return None
            self._sizes.move_to_end(path)
        try:
            with path.open("rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            found = _checked(content, user)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            self.remove(user)
            with self._lock:
                self._corrupt += 1
            log.warning("%s is damaged and was removed; its state is computed anew (%s)", path, error)
            return None
        with self._lock:
            self._restored += 1
        return found

    def remove(self, user: str) -> None:
        """Forget a user's state."""
        path = self._path(user)
        self._forget(path)
        path.unlink(missing_ok=True)

    def _path(self, user: str) -> Path:
        return self._path_of(id_bytes(user))

    def _path_of(self, user: bytes) -> Path:
        name = blake2b(user, digest_size=16).hexdigest()
        return self._folder / name[:2] / f"{name}{SUFFIX}"

    def _forget(self, path: Path) -> None:
        with self._lock:
            self._used_bytes -= self._sizes.pop(path, 0)

    def _reserve(self, path: Path, size: int) -> None:
        """Take `size` bytes of the budget, in place of what the path had; the oldest files go for it."""
        with self._lock:
            self._used_bytes -= self._sizes.pop(path, 0)
            while self._used_bytes + size > self._budget_bytes and self._sizes:
                oldest, freed = self._sizes.popitem(last=False)
                self._used_bytes -= freed
                oldest.unlink(missing_ok=True)
            self._used_bytes += size

    def _remove_others(self, version: str) -> None:
        """States of a version that was built anew, or is served differently now."""
        for other in self._folder.parent.iterdir():
            if other != self._folder and other.name.rpartition("-")[0] == version:
                shutil.rmtree(other, ignore_errors=True)

    def _read_folder(self) -> None:
        for part in self._folder.glob(f"*/*{UNFINISHED}"):
            part.unlink(missing_ok=True)
        found = [(os.stat(path), path) for path in self._folder.glob(f"*/*{SUFFIX}")]
        for status, path in sorted(found, key=lambda pair: pair[0].st_mtime_ns):
            self._sizes[path] = status.st_size
            self._used_bytes += status.st_size
        while self._used_bytes > self._budget_bytes:
            oldest, freed = self._sizes.popitem(last=False)
            self._used_bytes -= freed
            oldest.unlink(missing_ok=True)


def id_bytes(user: str) -> bytes:
    """A user's id as bytes, whatever characters it is made of."""
    return user.encode(errors="surrogatepass")


def _checked(content: mmap.mmap, user: str) -> tuple[SpilledHeader, Array]:
    """A file's header and arrays.

    Raises:
        ValueError, msgspec.MsgspecError: cut, changed, or of another user.
    """
    start = len(MAGIC) + LENGTH_BYTES
    if content[: len(MAGIC)] != MAGIC:
        raise ValueError("it does not begin as a state does")
    head_end = start + int.from_bytes(content[len(MAGIC) : start], "little")
    view = np.frombuffer(content, np.uint8)
    digest = sha256(view[start:head_end].data)
    digest.update(view[head_end + DIGEST_BYTES :].data)
    if digest.digest() != content[head_end : head_end + DIGEST_BYTES]:
        raise ValueError("its checksum is wrong")
    header = msgspec.msgpack.decode(content[start:head_end], type=SpilledHeader)
    arrays = view[head_end + DIGEST_BYTES :]
    if header.user != id_bytes(user) or arrays.nbytes != header.size_bytes:
        raise ValueError("it is of another user or size")
    return header, arrays
