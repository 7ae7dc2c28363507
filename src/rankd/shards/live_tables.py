"""Tables that move while they are asked: a `TableSource` that follows a placement file.

    file changes -> open the new placement beside the old one -> its shards can be asked -> new look-ups go there
                 -> look-ups under way end where they began -> the old placement is closed -> its shards may go

A look-up is answered by one placement as a whole. One thread watches the file; `generation` says when nobody asks an
earlier placement any more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.pooling import LookUp, TableSource
from rankd.errors import ShardFailure
from rankd.shards.placement_file import Placement, read_placement
from rankd.types import Float32Array

LEAVE_S = 30.0
"""A look-up that is not over so long after its placement was left is of a request that is stuck: it holds up nobody."""
LOOK_S = 0.1
"""Between two looks at the file."""

log = logging.getLogger("rankd")

Stamp = tuple[int, int, int]


@dataclass(slots=True)
class _Held:
    """A placement in use, and how many look-ups are under way in it."""

    placement: Placement
    source: TableSource
    under_way: int = 0


class LiveTables:
    """A `TableSource` over whatever the file says; `open_placed` makes one of a placement, without waiting for its
    shards, which have `start_seconds`. Thread-safe.

    Raises:
        ConfigError: the file cannot be read, or is of other tables. ArtifactError: tables here are damaged.
        ShardFailure: a shard cannot be asked in time.
    """

    def __init__(self, file: Path, open_placed: Callable[[Placement], TableSource], start_seconds: float) -> None:
        self._file, self._open, self._start_seconds = file, open_placed, start_seconds
        self._changed = threading.Condition()  # guards what follows
        self._seen = _stamp(file)
        first = read_placement(file)
        self._held = _Held(first, open_placed(first))
        self._generation = first.generation
        self._past: Counter[str] = Counter()  # calls of placements that are closed
        self._past_rows: Counter[str] = Counter()  # and rows
        self._closing = threading.Event()
        self._complaint = ""
        self._thread = threading.Thread(target=self._watch, name="tables-placement", daemon=True)
        try:
            self._held.source.wait_up(start_seconds)
        except BaseException:
            self._held.source.close()
            raise
        self._thread.start()

    @property
    def local(self) -> bool:
        """Whether the placement in use has no shards."""
        return self._held.source.local

    def begin(self, asked: Sequence[JaggedIds], into: Sequence[Float32Array], deadline: float | None = None) -> LookUp:
        """All of it in one placement; see `TableSource.begin`."""
        with self._changed:
            held = self._held
            held.under_way += 1
        try:
            return _LiveLookUp(held.source.begin(asked, into, deadline), partial(self._ended, held))
        except BaseException:
            self._ended(held)
            raise

    def calls(self) -> Mapping[str, int]:
        """Calls of shards since the start, by what became of them, of all placements."""
        with self._changed:
            return self._past + Counter(self._held.source.calls())

    def replicas_up(self) -> Mapping[str, int]:
        """How many replicas of each shard of the newest placement can be asked."""
        return self._held.source.replicas_up()

    def rows(self) -> Mapping[str, int]:
        """Rows of shards' tables looked up since the start, by where they were, of all placements."""
        with self._changed:
            return self._past_rows + Counter(self._held.source.rows())

    def kept_bytes(self) -> int:
        """Of the hot rows that the newest placement keeps here."""
        return self._held.source.kept_bytes()

    def generation(self) -> int:
        """That of the placement in use; an earlier one is not asked any more."""
        return self._generation

    def contents(self) -> Mapping[str, str]:
        """Those of the newest placement; see `TableSource.contents`."""
        return self._held.source.contents()

    def wait_up(self, within_s: float) -> None:
        """See `TableSource.wait_up`."""
        self._held.source.wait_up(within_s)

    def close(self) -> None:
        """Follow the file no more, and end all connections."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join()
        self._held.source.close()

    def _ended(self, held: _Held) -> None:
        with self._changed:
            held.under_way -= 1
            if not held.under_way:
                self._changed.notify_all()

    def _watch(self) -> None:
        while not self._closing.wait(LOOK_S):
            stamp = _stamp(self._file)
            if stamp == self._seen:
                continue
            try:
                self._follow(read_placement(self._file), stamp)
            except Exception as error:  # noqa: BLE001 - this thread has to go on, whatever the file or the machine do
                if str(error) != self._complaint:
                    log.warning("tables stay with placement %d: %s", self._generation, error)
                self._complaint = str(error)
            else:
                self._seen, self._complaint = stamp, ""

    def _follow(self, placement: Placement, stamp: Stamp) -> None:
        """Go over to a placement.

        Raises:
            ShardFailure: its shards cannot be asked in time, or not before the file has changed again.
            ConfigError, ArtifactError: as the constructor.
        """
        if placement == self._held.placement:
            return
        source = self._open(placement)
        try:
            self._wait_up(source, stamp)
        except BaseException:
            source.close()
            raise
        with self._changed:
            old, self._held = self._held, _Held(placement, source)
            self._changed.wait_for(lambda: not old.under_way or self._closing.is_set(), LEAVE_S)
            self._past += Counter(old.source.calls())
            self._past_rows += Counter(old.source.rows())
        old.source.close()
        self._generation = placement.generation
        log.info("tables follow placement %d", placement.generation)

    def _wait_up(self, source: TableSource, stamp: Stamp) -> None:
        """Until each shard of `source` can be asked. After `start_seconds` it is enough that no more of them are away
        than of those asked now: a placement with one lost shard is better than one with two."""
        until = time.perf_counter() + self._start_seconds
        while True:
            try:
                source.wait_up(LOOK_S)
            except ShardFailure:
                late = time.perf_counter() > until
                if late and _away(source) <= _away(self._held.source):
                    return
                if late or self._closing.is_set() or _stamp(self._file) != stamp:
                    raise
            else:
                return


class _LiveLookUp:
    """A look-up of one placement; `ended` is called once, when it needs that placement no more."""

    def __init__(self, looking_up: LookUp, ended: Callable[[], None]) -> None:
        self._looking_up, self._ended = looking_up, ended
        self.there, self.when_there = looking_up.there, looking_up.when_there
        self._lock = threading.Lock()  # guards `_over`
        self._over = False

    def finish(self) -> tuple[str, ...]:
        """See `LookUp.finish`."""
        try:
            return self._looking_up.finish()
        finally:
            self._end()

    def forget(self) -> None:
        """See `LookUp.forget`."""
        try:
            self._looking_up.forget()
        finally:
            self._end()

    def _end(self) -> None:
        with self._lock:
            first, self._over = not self._over, True
        if first:
            self._ended()


def _away(source: TableSource) -> int:
    return sum(not up for up in source.replicas_up().values())


def _stamp(file: Path) -> Stamp:
    """What differs when the file was replaced; zeros if it is not there."""
    try:
        found = file.stat()
    except OSError:
        return 0, 0, 0
    return found.st_ino, found.st_size, found.st_mtime_ns
