"""One table of rows: the cache next to the model, and the store behind it.

In: keys of a request. Out: `AskedRows`, from which `read_into` writes the model's columns once the rows have come (or
have not: the caller's defaults stay). A key is fetched by one request at a time; who needs it meanwhile waits for the
same answer (single flight). What async tables miss is gathered while a fetch is under way and fetched together.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from itertools import islice

import msgspec
import numpy as np

from rankd.features.cache.row_cache import RowCache
from rankd.features.feature_config import MIB, Mode, RowsConfig
from rankd.features.rows.row_decoding import RowDecoder, RowStatus
from rankd.features.rows.row_schema import RowSchema
from rankd.features.rows.table_meta import decode_meta
from rankd.features.stores.feature_store import FeatureStore, StoreFailure, Trouble
from rankd.features.stores.store_keys import meta_key, row_key, row_prefix
from rankd.observe.feature_metrics import RowFigures
from rankd.types import Array, Float32Array, Int32Array, RowCounts

log = logging.getLogger("rankd")
MOST_BEHIND = 65_536
"""Keys that may wait to be fetched behind requests; more are forgotten, and asked for again by who needs them."""
BEHIND_AT_ONCE = 1024

_NEEDED = np.zeros(256, bool)
_NEEDED[[RowStatus.MISSING, RowStatus.STALE, RowStatus.ABSENT_STALE]] = True


@dataclass(frozen=True, slots=True)
class Loaded:
    """The loading of a table that is read now."""

    generation: int
    schema: RowSchema
    prefix: bytes
    cache: RowCache | None


@dataclass(slots=True)
class Flight:
    """Keys of a loading on their way from the store; when `landed` is done `rows` and `present` hold them (or nothing
    came)."""

    loaded: Loaded
    keys: Array
    landed: Future[None] = field(default_factory=Future)
    rows: Array | None = None
    present: Array | None = None


@dataclass(slots=True)
class AskedRows:
    """What a request asked of a table: its keys, the ids behind them, and the flights that it waits for."""

    loaded: Loaded
    keys: Array
    ids: Sequence[str]
    flights: list[Flight] = field(default_factory=list)

    def part(self, first: int, count: int) -> AskedRows:
        """The same of some of the keys alone."""
        last = first + count
        if first == 0 and last == self.keys.shape[0]:
            return self
        return AskedRows(self.loaded, self.keys[first:last], self.ids[first:last], self.flights)


class RowTable:
    """A table of one namespace. Thread-safe. Nothing is read before `look` has found a loading of it."""

    def __init__(
        self,
        table: str,
        namespace: str,
        store: FeatureStore,
        config: RowsConfig,
        make_cache: Callable[[int, int], RowCache] = RowCache,
    ) -> None:
        self.table, self.config = table, config
        self._store, self._meta_key, self._namespace = store, meta_key(namespace, table), namespace
        self._make_cache = make_cache
        self.loaded: Loaded | None = None
        self._meta = b""
        self._flying: dict[int, Flight] = {}
        self._behind: dict[int, str] = {}
        self._behind_flying = False
        self._lock = threading.Lock()  # guards the three above, the figures, and which loading the cache has rows of
        self._counts = RowCounts()
        self._oldest_ms = self._fetched_keys = self._shared = 0

    def look(self) -> None:
        """Read what the store says of the table now, and follow it: another loading, another schema.

        Raises:
            StoreFailure: the store did not answer; what was known stays.
            ConfigError: there is no memory for a cache of such rows; nothing is read until there is.
        """
        (value,) = self._store.get([self._meta_key]).result()
        if value is None or value == self._meta:
            return
        try:
            meta = decode_meta(value)
        except msgspec.MsgspecError as error:
            raise StoreFailure(
                f"table '{self.table}': its description cannot be read: {error}", Trouble.BROKEN
            ) from error
        if meta.schema is not None and meta.generation and self._follow(meta.generation, meta.schema):
            log.info("table '%s' of '%s': loading %d, %d rows", self.table, self._namespace, meta.generation, meta.rows)
        self._meta = value

    def ask(self, keys: Array, ids: Sequence[str]) -> AskedRows | None:
        """Look keys (n,) uint64 of n ids up, and have what is missing fetched; 0 is no key. None while nothing is
        loaded."""
        loaded = self.loaded
        if loaded is None:
            return None
        asked = AskedRows(loaded, keys, ids)
        if loaded.cache is None:
            wanted = np.flatnonzero(keys)
            if wanted.size:
                asked.flights = [self._take_off(loaded, keys[wanted], _chosen(ids, wanted))]
            return asked
        status = np.empty(keys.shape[0], np.uint8)
        loaded.cache.probe(keys, _now_ms(), status)
        wanted = np.flatnonzero(_NEEDED[status])
        if not wanted.size:
            return asked
        named = dict(zip(keys[wanted].tolist(), _chosen(ids, wanted), strict=True))
        if self.config.mode is Mode.ASYNC:
            self._fetch_behind(loaded, named)
        else:
            asked.flights = self._fetch(loaded, named)
        return asked

    def read_into(
        self,
        asked: AskedRows,
        decoder: RowDecoder,
        numeric: Float32Array,
        categories: Int32Array,
        until: float | None = None,
    ) -> RowCounts:
        """Write the rows that are there into numeric (n, F) and categories (n, G); others keep what they hold.

        Rows that were here when they were asked for and have left since are fetched again by a sync table, and waited
        for up to `until` (seconds of `perf_counter`).
        """
        loaded, keys, now = asked.loaded, asked.keys, _now_ms()
        status, oldest = np.zeros(keys.shape[0], np.uint8), 0
        if loaded.cache is not None:
            oldest = loaded.cache.read(keys, now, decoder, numeric, categories, status)
        else:
            status[keys == 0] = RowStatus.SKIPPED
        for flight in (*asked.flights, *self._fetch_left(asked, status, until)):
            _read_flight(flight, keys, decoder, numeric, categories, status)
        counts = _count(status)
        with self._lock:
            self._counts = self._counts + counts
            self._oldest_ms = max(self._oldest_ms, oldest)
        return counts

    def _fetch_left(self, asked: AskedRows, status: Array, until: float | None) -> list[Flight]:
        """Flights, landed, of the rows of a sync table that left between the look-up and now; there are hardly any."""
        if self.config.mode is Mode.ASYNC or asked.loaded.cache is None:
            return []
        brought = [flight.keys for flight in asked.flights]
        missing = np.flatnonzero(status == RowStatus.MISSING)
        left = missing[~np.isin(asked.keys[missing], np.concatenate(brought))] if brought else missing
        if not left.size:
            return []
        named = dict(zip(asked.keys[left].tolist(), _chosen(asked.ids, left), strict=True))
        flights = self._fetch(asked.loaded, named)
        seconds = None if until is None else max(until - time.perf_counter(), 0.0)
        wait([flight.landed for flight in flights], seconds)
        return flights

    def figures(self) -> RowFigures:
        """A snapshot; the age is of the oldest row used since the last one."""
        loaded = self.loaded
        cache = loaded.cache if loaded is not None else None
        with self._lock:
            oldest, self._oldest_ms = self._oldest_ms, 0
            return RowFigures(
                counts=self._counts,
                fetched=self._fetched_keys,
                shared=self._shared,
                oldest_seconds=oldest / 1e3,
                cached_rows=cache.used_slots if cache is not None else 0,
                cache_bytes=cache.memory_bytes if cache is not None else 0,
                budget_bytes=int(self.config.budget_mib * MIB),
                evicted=cache.counts().evictions if cache is not None else 0,
                generation=loaded.generation if loaded is not None else 0,
            )

    def _follow(self, generation: int, schema: RowSchema) -> bool:
        """Read a loading from now on; whether it is another one."""
        before, prefix = self.loaded, row_prefix(self._namespace, self.table, generation)
        if before is None or before.schema != schema:
            self.loaded = before = None  # its cache goes before another one is made: their memory is one budget
            self.loaded = Loaded(generation, schema, prefix, self._new_cache(schema))
            return True
        if before.generation == generation:
            return False
        with self._lock:
            if before.cache is not None:
                before.cache.expire()  # rows of the loading before are stale, not gone
            self.loaded = Loaded(generation, schema, prefix, before.cache)
        return True

    def _new_cache(self, schema: RowSchema) -> RowCache | None:
        budget = int(self.config.budget_mib * MIB)
        return self._make_cache(schema.row_words, budget) if budget else None

    def _fetch(self, loaded: Loaded, named: dict[int, str]) -> list[Flight]:
        """Flights that bring all named keys: those under way, and one for the others."""
        flights, new = {}, {}
        with self._lock:
            for key, name in named.items():
                under_way = self._flying.get(key)
                if under_way is not None and under_way.loaded is loaded:
                    flights[id(under_way)] = under_way
                else:
                    new[key] = name
            self._shared += len(named) - len(new)
            flight = self._begin(loaded, new)
        if new:
            self._send(flight, list(new.values()), lambda: self._landed(flight))
        return [*flights.values(), flight] if new else list(flights.values())

    def _begin(self, loaded: Loaded, named: dict[int, str]) -> Flight:
        """Under the lock: a flight for keys of which none is under way, of this loading."""
        flight = Flight(loaded, np.fromiter(named, np.uint64, len(named)))
        self._flying.update(dict.fromkeys(named, flight))
        return flight

    def _landed(self, flight: Flight) -> None:
        with self._lock:
            for key in flight.keys.tolist():
                if self._flying.get(key) is flight:
                    del self._flying[key]

    def _fetch_behind(self, loaded: Loaded, named: dict[int, str]) -> None:
        with self._lock:
            flying = self._flying
            new = (one for one in named.items() if one[0] not in flying or flying[one[0]].loaded is not loaded)
            self._behind.update(islice(new, max(MOST_BEHIND - len(self._behind), 0)))
            if self._behind_flying or not self._behind:
                return
            self._behind_flying = True
        self._send_behind(loaded)

    def _send_behind(self, loaded: Loaded) -> None:
        """One fetch of what has gathered; the next one starts when it lands.

        A store that answered before it returned (it is local, or refuses) is asked for the rest by who needs something
        next: one request must not do it for all of them.
        """
        with self._lock:
            taken = dict(islice(self._behind.items(), BEHIND_AT_ONCE))
            for key in taken:
                del self._behind[key]
            if not taken:
                self._behind_flying = False
                return
            flight = self._begin(loaded, taken)
        sent, sender = False, threading.get_ident()

        def then() -> None:
            self._landed(flight)
            if sent or threading.get_ident() != sender:
                self._send_behind(self.loaded or loaded)
            else:
                self._behind_flying = False

        self._send(flight, list(taken.values()), then)
        sent = True

    def _take_off(self, loaded: Loaded, keys: Array, names: list[str]) -> Flight:
        flight = Flight(loaded, keys)
        self._send(flight, names, lambda: None)
        return flight

    def _send(self, flight: Flight, names: list[str], then: Callable[[], None]) -> None:
        """Fetch a flight's keys; when they came (or failed) they are in the cache, then it has landed."""
        prefix = flight.loaded.prefix

        def came(future: Future[list[bytes | None]]) -> None:
            try:
                if future.exception() is None:
                    self._receive(flight, future.result())
            finally:
                then()
                flight.landed.set_result(None)

        self._store.get([row_key(prefix, name) for name in names]).add_done_callback(came)

    def _receive(self, flight: Flight, values: Sequence[bytes | None]) -> None:
        loaded = flight.loaded
        flight.rows, flight.present = _as_rows(values, loaded.schema)
        ttl, absent = int(self.config.ttl_seconds * 1e3), int(self.config.absent_seconds * 1e3)
        with self._lock:
            if loaded.cache is not None and self.loaded is loaded:  # else these rows are of the loading before
                loaded.cache.insert(flight.keys, flight.rows, flight.present, _now_ms(), ttl, absent)
            self._fetched_keys += len(values)


def _chosen(ids: Sequence[str], places: Array) -> list[str]:
    return [ids[i] for i in places.tolist()]


def _as_rows(values: Sequence[bytes | None], schema: RowSchema) -> tuple[Array, Array]:
    """Values as rows (n, words) uint32 and which are there (n,) bool; one of another length has another schema: a row
    of zeros, whose mark no decoder takes."""
    size, nothing = schema.row_bytes, bytes(schema.row_bytes)
    whole = b"".join(value if value is not None and len(value) == size else nothing for value in values)
    present = np.fromiter((value is not None for value in values), bool, len(values))
    return np.frombuffer(whole, np.uint32).reshape(len(values), schema.row_words), present


def _read_flight(
    flight: Flight, keys: Array, decoder: RowDecoder, numeric: Float32Array, categories: Int32Array, status: Array
) -> None:
    """What a flight brought and the cache does not have fresh, if there is any: no cache, or evicted already."""
    late = np.flatnonzero(_NEEDED[status])
    if not late.size or flight.rows is None or flight.present is None:
        return
    if np.array_equal(keys[late], flight.keys):  # the usual case without a cache
        places, rows = late, np.arange(late.size)
    else:
        place_of = {key: row for row, key in enumerate(flight.keys.tolist())}
        found = [
            (i, place_of[key]) for i, key in zip(late.tolist(), keys[late].tolist(), strict=True) if key in place_of
        ]
        places = np.asarray([i for i, _ in found], np.int64)
        rows = np.asarray([row for _, row in found], np.int64)
    there = flight.present[rows]
    gone = places[~there]  # what an old row has written already is counted as that
    status[gone] = np.where(status[gone] == RowStatus.STALE, RowStatus.STALE, RowStatus.ABSENT)
    decoded = decoder.decode(flight.rows[rows[there]], numeric, categories, places[there])
    known = places[there]
    otherwise = np.where(status[known] == RowStatus.STALE, RowStatus.STALE, RowStatus.WRONG_SCHEMA)
    status[known] = np.where(decoded, RowStatus.FRESH, otherwise)


def _count(status: Array) -> RowCounts:
    by_status = np.bincount(status, minlength=len(RowStatus))
    return RowCounts(
        fresh=int(by_status[RowStatus.FRESH]),
        stale=int(by_status[RowStatus.STALE]),
        default=int(by_status[[RowStatus.MISSING, RowStatus.WRONG_SCHEMA]].sum()),
        absent=int(by_status[[RowStatus.ABSENT, RowStatus.ABSENT_STALE]].sum()),
        wrong_schema=int(by_status[RowStatus.WRONG_SCHEMA]),
    )


def _now_ms() -> int:
    return int(time.monotonic() * 1e3)
