"""Who may fill a table, and when its readers change over: the table's meta value, changed by exchange alone.

    claim -> advance, advance, ... -> switch -> retire
    |        |                        |         removes the rows before, when every reader has moved on
    |        |                        the new rows are the ones to read, from one moment to the next
    |        rows_done grows; whoever comes after a crash goes on from there
    `loading` names a new generation and who fills it

`Loading.source` is "<mark of the file>/<loader>/<beat>". The loader is drawn at random, so that each knows whether the
loading is still its own; one that is not stops, whatever it was doing. A loader changes the beat every second or so,
and leaves its name out when it gives up. Who finds a loading that is given up, or that does not change for
`watch_seconds`, takes it over. If the other only slept, the two wrote the same rows of the same file, or rows of two
generations; the one that lost the claim stops at its next step.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime

import msgspec
import numpy as np
from xxhash import xxh3_64_intdigest

from rankd.errors import DataError
from rankd.features.filling.patience import Patience
from rankd.features.rows.row_schema import RowSchema
from rankd.features.rows.table_meta import Loading, TableMeta, decode_meta, encode_meta
from rankd.features.stores.feature_store import FeatureStore, StoreFailure
from rankd.features.stores.store_keys import meta_key, row_prefix

WATCH_STEP_S = 0.1
BEAT_S = 1.0
REMOVED_AT_ONCE = 10_000


class MetaCell:
    """The meta value of one table, changed in one step or not at all. `meta` is as it was when last seen."""

    def __init__(self, store: FeatureStore, namespace: str, table: str, patience: Patience) -> None:
        self.store, self.namespace, self.table, self.patience = store, namespace, table, patience
        self._key = meta_key(namespace, table)
        self._raw: bytes | None = None
        self.meta = TableMeta()

    @property
    def name(self) -> str:
        """The table, in messages."""
        return f"table '{self.table}' of '{self.namespace}'"

    def read(self) -> TableMeta:
        """The meta value now; that of a table that was never loaded if there is none.

        Raises:
            DataError: it cannot be read.
            StoreFailure: no answer in time.
        """
        (raw,) = self.patience.attempt(lambda: self.store.get([self._key]).result())
        try:
            self._raw, self.meta = raw, TableMeta() if raw is None else decode_meta(raw)
        except msgspec.MsgspecError as error:
            raise DataError(
                f"what the store says of {self.name} cannot be read: {error}; was it written by a newer release?"
            ) from error
        return self.meta

    def change(self, step: Callable[[TableMeta], TableMeta]) -> TableMeta:
        """Write what `step` makes of the meta value; it is asked again whenever somebody else changed it first.

        Raises:
            StoreFailure: no answer in time. Whatever `step` raises.
        """
        while True:
            new = step(self.meta)
            if new == self.meta:
                return new
            if self._exchange(new):
                return new
            self.read()

    def _exchange(self, new: TableMeta) -> bool:
        value = encode_meta(new)
        done = self.patience.attempt(lambda: self.store.exchange(self._key, self._raw, value).result())
        if done:
            self._raw, self.meta = value, new
        return done

    def prefix(self, generation: int) -> bytes:
        """What the keys of a generation's rows begin with."""
        return row_prefix(self.namespace, self.table, generation)

    def remove(self, generation: int, beat: Callable[[], None] = lambda: None) -> None:
        """Remove all rows of a generation; `beat` is called now and then.

        Raises:
            StoreFailure: no answer in time. Whatever `beat` raises.
        """

        def remove() -> None:
            deleting: Future[None] | None = None
            for keys in _gathered(self.store.keys(self.prefix(generation))):
                if deleting is not None:
                    deleting.result()
                deleting = self.store.delete(keys)
                beat()
            if deleting is not None:
                deleting.result()

        self.patience.attempt(remove)

    def count(self, generation: int, beat: Callable[[], None] = lambda: None) -> int:
        """How many rows a generation has; `beat` is called now and then.

        Raises:
            StoreFailure: no answer in time. Whatever `beat` raises.
        """

        def count() -> int:
            hashes = []  # a store may name a key twice; 8 bytes of each are enough to know it again
            for keys in self.store.keys(self.prefix(generation)):
                hashes.append(np.fromiter(map(xxh3_64_intdigest, keys), np.uint64, len(keys)))
                beat()
            return len(np.unique(np.concatenate(hashes))) if hashes else 0

        return self.patience.attempt(count)

    def retire(self, grace_seconds: float) -> None:
        """Remove the rows that nobody has to read any more, `grace_seconds` from now.

        Raises:
            StoreFailure: no answer in time; the next loading removes them.
        """
        retired = self.meta.retired
        if not retired:
            return
        self.patience.sleep(grace_seconds)
        for generation in range(retired, self.meta.generation):
            self.remove(generation)
        self.change(lambda meta: msgspec.structs.replace(meta, retired=0) if meta.retired == retired else meta)

    def unattended(self, watch_seconds: float) -> Loading | None:
        """The loading that somebody left unfinished, if there is one.

        Raises:
            DataError: it is not left, somebody is at it.
            StoreFailure: no answer in time.
        """
        seen = self.read().loading
        if seen is not None and _loader_of(seen):
            until = self.patience.clock() + watch_seconds
            while self.patience.clock() < until:
                self.patience.sleep(WATCH_STEP_S)
                if self.read().loading != seen:
                    raise self.busy(seen)
        return seen

    def busy(self, loading: Loading) -> DataError:
        """The error of whoever finds a loader at work."""
        return DataError(
            f"{self.name} is being loaded by another process, {loading.rows_done:,} of {loading.rows:,} rows are "
            f"written; wait for it to end, then run this again"
        )


class TableClaim:
    """The right to fill one new generation of a table, from `claim` to `switch`; given up where a `with` fails."""

    def __init__(self, cell: MetaCell) -> None:
        self._cell = cell
        self._loader = secrets.token_hex(8)
        self._mark = ""
        self._beats = 0
        self._touched = cell.patience.clock()

    def claim(self, schema: RowSchema, mark: str, rows: int, seen: Loading | None) -> Loading:
        """Begin a loading of the file with this mark, or go on with `seen`, which was left unfinished.

        The rows of a loading that is not gone on with are removed.

        Raises:
            DataError: another loader is at it, or the schema's version was not raised.
            StoreFailure: no answer in time.
        """
        self._mark = mark

        def step(meta: TableMeta) -> TableMeta:
            if meta.loading is not None and self._is_mine(meta.loading):
                return meta
            if meta.loading is not None and meta.loading != seen:
                raise self._cell.busy(meta.loading)
            check_version(meta.schema, schema, self._cell.name)
            last = meta.loading or Loading(meta.generation, schema, "", 0, 0)
            same = (last.schema, last.source.partition("/")[0], last.rows) == (schema, mark, rows)
            done, generation = (last.rows_done, last.generation) if same else (0, last.generation + 1)
            return msgspec.structs.replace(meta, loading=Loading(generation, schema, self._source(), done, rows))

        loading = self._cell.change(step).loading
        if loading is None:
            raise self._lost()
        if seen is not None and seen.generation != loading.generation:
            self._cell.remove(seen.generation, self.beat)
        if loading.rows_done == 0:  # a store that lost its meta value alone may have rows of this number
            self._cell.remove(loading.generation, self.beat)
        return loading

    def advance(self, rows_done: int) -> None:
        """Say that so many rows of the file are written.

        Raises:
            DataError: the loading is somebody else's now.
            StoreFailure: no answer in time.
        """
        self._touched = self._cell.patience.clock()
        self._beats += 1

        def step(meta: TableMeta) -> TableMeta:
            if meta.loading is None or not self._is_mine(meta.loading):
                raise self._lost()
            loading = msgspec.structs.replace(meta.loading, rows_done=rows_done, source=self._source())
            return msgspec.structs.replace(meta, loading=loading)

        self._cell.change(step)

    def beat(self) -> None:
        """Show that somebody is at it, if it was not shown for a while.

        Raises:
            DataError: the loading is somebody else's now.
            StoreFailure: no answer in time.
        """
        loading = self._cell.meta.loading
        if loading is not None and self._cell.patience.clock() > self._touched + BEAT_S:
            self.advance(loading.rows_done)

    def __enter__(self) -> TableClaim:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """Give up on any error: say so, that whoever goes on need not watch. A store in trouble is not told."""
        if kind is None:
            return
        self._loader, mine = "", self._loader
        self._cell.patience.seconds = 0.0  # whoever gives up does not wait

        def step(meta: TableMeta) -> TableMeta:
            if meta.loading is None or _loader_of(meta.loading) != mine:
                return meta
            loading = msgspec.structs.replace(meta.loading, source=self._source())
            return msgspec.structs.replace(meta, loading=loading)

        with suppress(StoreFailure):
            self._cell.change(step)

    def switch(self, loading: Loading) -> TableMeta:
        """Make the rows of the claimed generation the ones to read.

        Raises:
            DataError: the loading is somebody else's now.
            StoreFailure: no answer in time.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")

        def step(meta: TableMeta) -> TableMeta:
            if meta.generation == loading.generation:  # done, and the store's answer was lost
                return meta
            if meta.loading is None or not self._is_mine(meta.loading):
                raise self._lost()
            # Generations between the current one and this were abandoned: they are swept with it, to be sure.
            first = min(filter(None, (meta.retired, meta.generation)), default=1)
            retired = first if first < loading.generation else 0
            return TableMeta(loading.generation, loading.schema, loading.rows, now, None, retired)

        return self._cell.change(step)

    def _source(self) -> str:
        return f"{self._mark}/{self._loader}/{self._beats}"

    def _is_mine(self, loading: Loading) -> bool:
        return _loader_of(loading) == self._loader

    def _lost(self) -> DataError:
        other = self._cell.meta.loading
        if other is not None:
            return self._cell.busy(other)
        return DataError(
            f"this loading of {self._cell.name} is no longer known to the store: another process ended it, or the "
            f"store was emptied; run this again"
        )


def _gathered(batches: Iterator[list[bytes]]) -> Iterator[list[bytes]]:
    """The same keys in batches of REMOVED_AT_ONCE or a little more."""
    gathered: list[bytes] = []
    for keys in batches:
        gathered += keys
        if len(gathered) >= REMOVED_AT_ONCE:
            yield gathered
            gathered = []
    if gathered:
        yield gathered


def _loader_of(loading: Loading) -> str:
    """Who is at a loading; nobody if it was given up."""
    return loading.source.split("/")[1]


def check_version(current: RowSchema | None, schema: RowSchema, name: str) -> None:
    """Whether a schema says by its version that it is another one.

    Raises:
        DataError: it has other columns than the current one, and the same version.
    """
    if current is not None and current.version == schema.version and current.columns != schema.columns:
        raise DataError(
            f"{name} has version {schema.version} of its schema already, with other columns; raise version to "
            f"{schema.version + 1}"
        )
