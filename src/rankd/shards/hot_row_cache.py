"""The hottest rows of tables on shards, kept in this process so that shards are not asked for them.

A plan says of which tables, and how many; which rows they are is learned from the requests, since it changes from day
to day and a plan does not. A few requests a second are counted; every few seconds the rows that have become hot are
asked of the shards, and a new snapshot (`kept_rows.py`) takes the place of the old one. Nothing waits for that.

Rows belong to the connections that they came on: when one is made anew, be it to the same shard, what is kept is not
used any more and asked for again. A shard that was restarted with other tables is so never mixed with its old rows.
Nothing outlives the process, or the plan.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.table_spec import TableSpec
from rankd.shards.kept_rows import INDEX_BYTES, KeptRows, SomeRows, pack
from rankd.shards.routing import Router
from rankd.shards.row_counting import RowCounter
from rankd.types import Float32Array, Int64Array

log = logging.getLogger("rankd")
SAMPLE_SECONDS = 0.25
"""From one request that is counted to the next: one of 270 samples with 214 ids takes about 5 ms of a thread's time."""
REFRESH_SECONDS = 5.0
CHANGED = 0.05
"""A share of the rows: if fewer have become hot, or cold, what is kept stays."""
FETCHED_AT_ONCE = 1024
Fetch = Callable[[str, Int64Array], Float32Array]
"""Rows (n,) of a table -> their numbers (n, dim), by asking the shards."""


class HotRowCache:
    """Keeps up to `rows` of each table, in no more memory than these take by themselves. `generation` is a number that
    grows with each new connection. Thread-safe, but for `learn` and `refresh`, which its own thread calls."""

    def __init__(self, router: Router, rows: Mapping[str, int], fetch: Fetch, generation: Callable[[], int]) -> None:
        self._router, self._fetch, self._generation = router, fetch, generation
        specs = {spec.name: spec for spec in router.specs}
        self._specs: dict[str, TableSpec] = {name: specs[name] for name in rows}
        fitting = {
            name: min(rows[name], rows[name] * spec.row_bytes // (spec.row_bytes + INDEX_BYTES))
            for name, spec in self._specs.items()
        }
        self._counters = {name: RowCounter(wanted) for name, wanted in fitting.items() if wanted}
        self._kept: KeptRows | None = None
        self._samples: queue.SimpleQueue[Sequence[JaggedIds] | None] = queue.SimpleQueue()
        self._next_sample = 0.0
        self._thread = threading.Thread(target=self._run, name="rankd-hot-rows", daemon=True)

    def start(self) -> None:
        """Begin to learn."""
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        if self._thread.ident is not None:
            self._samples.put(None)
            self._thread.join()

    @property
    def kept(self) -> KeptRows | None:
        """The rows that are kept, if they are those of the shards that are asked now."""
        kept = self._kept
        return kept if kept is not None and kept.generation == self._generation() else None

    def saw(self, asked: Sequence[JaggedIds]) -> None:
        """A request; some are counted."""
        now = time.perf_counter()
        if now >= self._next_sample:
            self._next_sample = now + SAMPLE_SECONDS
            self._samples.put(asked)

    def learn(self, asked: Sequence[JaggedIds]) -> None:
        """Count a request."""
        for one in asked:
            samples = one.num_samples
            for place, name in enumerate(one.tables):
                if name in self._counters:
                    self._counters[name].saw(one.ids[one.offsets[place * samples] : one.offsets[(place + 1) * samples]])

    def refresh(self) -> None:
        """Keep what is hot now.

        Raises:
            RankdError: a shard does not give its rows; what was kept stays.
        """
        generation, kept = self._generation(), self.kept
        hot = {name: rows for name, counter in self._counters.items() if len(rows := counter.hottest())}
        old = {} if kept is None else kept.some
        if kept is not None and not any(_changed(rows, old.get(name)) for name, rows in hot.items()):
            return
        self._kept = KeptRows(
            self._router, {name: self._some(name, rows, old.get(name)) for name, rows in hot.items()}, generation
        )

    def _some(self, name: str, rows: Int64Array, old: SomeRows | None) -> SomeRows:
        """Those of `rows` that are kept already, and the others from their shards."""
        spec = self._specs[name]
        known = np.zeros(len(rows), bool) if old is None else np.isin(rows, old.rows)
        new = rows[~known]
        records = np.empty((len(rows), spec.row_bytes), np.uint8)
        if old is not None:
            records[known] = old.records[np.isin(old.rows, rows)]
        fetched = [
            pack(spec, some, self._fetch(name, some)).records
            for some in np.split(new, range(FETCHED_AT_ONCE, len(new), FETCHED_AT_ONCE))
            if len(some)
        ]
        if fetched:
            records[~known] = np.concatenate(fetched)
        return SomeRows(spec, rows, records)

    def _run(self) -> None:
        refreshed = time.perf_counter()
        while True:
            try:
                asked = self._samples.get(timeout=REFRESH_SECONDS)
            except queue.Empty:
                continue
            if asked is None:
                return
            try:
                self.learn(asked)
                if time.perf_counter() >= refreshed + REFRESH_SECONDS or (self._kept is not None and self.kept is None):
                    refreshed = time.perf_counter()
                    self.refresh()
            except Exception as error:  # noqa: BLE001 - without this thread samples would pile up for nobody
                log.info("hot rows are not kept for now: %s", error)


def _changed(hot: Int64Array, kept: SomeRows | None) -> bool:
    if kept is None:
        return True
    return len(np.setxor1d(hot, kept.rows, assume_unique=True)) > CHANGED * len(hot)
