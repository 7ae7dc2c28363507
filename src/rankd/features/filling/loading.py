"""Filling a table of a store from a Parquet file, so that its readers see the rows before or the new ones, never both.

In: a Parquet file with a row for each item or user, and its schema. Out: packed rows (`rows/row_packing.py`) under the
keys of a new generation, which `table_claim.py` makes the current one in one step when all of them are there. A loading
that was interrupted goes on where it was when it is run again. An update writes over the current rows instead, each of
them in one step. Histories: `history_loading.py`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from rankd.errors import DataError
from rankd.features.filling.patience import Patience
from rankd.features.filling.row_file import RowFile
from rankd.features.filling.table_claim import MetaCell, TableClaim
from rankd.features.rows.row_packing import check_schema, pack_rows
from rankd.features.rows.row_schema import RowSchema
from rankd.features.rows.table_meta import Loading, TableMeta
from rankd.features.stores.feature_store import FeatureStore, Pair, StoreFailure
from rankd.features.stores.store_keys import meta_key, row_key

BATCH_ROWS = 5000
# LMDB writes each page that a batch touches: a million rows of 256 bytes in random order took 41 s in batches of 5,000,
# 26 s of 15,000, 18 s of 32,768. Who appends to a history waits for one batch, which is why it is not the last.
LOCAL_BATCH_ROWS = 16_384
BATCH_BYTES = 4 << 20
MAX_NAMESPACE = 100

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what is done)."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a table is filled.

    `update` writes over the current rows. A store in trouble is asked again for `patience_seconds`. Rows that were
    replaced stay for `grace_seconds`, longer than servers take to notice. An unfinished loading that does not change
    for `watch_seconds` is taken over. `in_flight` batches of at most `batch_rows` rows are written at once; 0 is what
    suits the store, and a local one takes one at a time.
    """

    update: bool = False
    patience_seconds: float = 30.0
    grace_seconds: float = 5.0
    watch_seconds: float = 5.0
    batch_rows: int = 0
    in_flight: int = 4


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was loaded. `resumed_at` is how many rows an interrupted run had written; they count in `rows`."""

    namespace: str
    table: str
    generation: int
    schema_version: int
    rows: int
    bytes: int
    seconds: float
    resumed_at: int = 0


def load_rows(
    store: FeatureStore,
    namespace: str,
    schema: RowSchema,
    path: Path,
    options: LoadOptions = LoadOptions(),
    progress: Progress = lambda done, total, line: None,
) -> LoadReport:
    """Fill a table, or update it.

    Raises:
        DataError: the file does not fit the schema, the schema needs another version, or another loader is at it.
        ConfigError: a schema that no row can have.
        StoreFailure: no answer within the patience; the same command goes on from there.
    """
    began = time.monotonic()
    check_namespace(namespace)
    check_schema(schema, "the schema")
    file = RowFile(path, schema)
    progress(0, file.rows, "checking")
    file.check()
    cell = MetaCell(store, namespace, schema.table, Patience(options.patience_seconds))
    if options.update:
        generation, resumed = _update(cell, file, options, progress), 0
    else:
        generation, resumed = _replace(cell, file, options, progress)
    size = file.rows * schema.row_bytes
    seconds = time.monotonic() - began
    return LoadReport(namespace, schema.table, generation, schema.version, file.rows, size, seconds, resumed)


def read_table(store: FeatureStore, namespace: str, table: str, patience_seconds: float = 0.0) -> TableMeta:
    """What a store says of a table; of one that was never loaded, generation 0.

    Raises:
        DataError: it cannot be read.
        StoreFailure: no answer.
    """
    return MetaCell(store, namespace, table, Patience(patience_seconds)).read()


def list_tables(store: FeatureStore) -> list[tuple[str, str]]:
    """(namespace, table) of every table in a store; reads the names of all keys.

    Raises:
        StoreFailure: no answer.
    """
    prefix = meta_key("", "").removesuffix(b":")
    names = {key.removeprefix(prefix).decode() for keys in store.keys(prefix) for key in keys}
    return sorted((namespace, table) for namespace, _, table in (name.partition(":") for name in names))


def check_namespace(namespace: str) -> None:
    """Whether keys can begin with a namespace.

    Raises:
        DataError: empty, too long, or with a colon, which ends it in a key.
    """
    if not namespace or len(namespace.encode()) > MAX_NAMESPACE or ":" in namespace:
        raise DataError(
            f"namespace '{namespace}' cannot be used; it has 1 to {MAX_NAMESPACE} bytes and no colon, "
            f"and is the model's name as a rule"
        )


def _replace(cell: MetaCell, file: RowFile, options: LoadOptions, progress: Progress) -> tuple[int, int]:
    """The new generation, and how many of its rows an interrupted run had written."""
    mark = file.file.mark()
    done = 0
    try:
        seen = cell.unattended(options.watch_seconds)
        cell.retire(options.grace_seconds)
        with TableClaim(cell) as claim:
            loading = claim.claim(file.schema, mark, file.rows, seen)
            first = done = loading.rows_done
            prefix, step = cell.prefix(loading.generation), _batch_rows(cell, file, options)
            batches = _batches(file, prefix, first, step, claim.beat)
            with closing(_written(cell, batches, options, first)) as written:
                for done in written:
                    claim.advance(done)
                    progress(done, file.rows, "writing")
            _check_all_there(cell, claim, loading)
            claim.switch(loading)
    except StoreFailure as failure:
        raise StoreFailure(
            f"{failure}. {done:,} of {file.rows:,} rows are written, readers see the rows before; run the same "
            f"command again and it goes on from there",
            failure.trouble,
        ) from failure
    _retire(cell, options)
    return loading.generation, first


def _retire(cell: MetaCell, options: LoadOptions) -> None:
    try:
        cell.retire(options.grace_seconds)
    except StoreFailure as failure:
        raise StoreFailure(
            f"{failure}. The new rows of {cell.name} are in use, those before them are not removed yet; the next "
            f"loading does it",
            failure.trouble,
        ) from failure


def _update(cell: MetaCell, file: RowFile, options: LoadOptions, progress: Progress) -> int:
    """The generation that was written over."""
    done = 0
    try:
        cell.unattended(options.watch_seconds)
        meta = cell.meta
        _check_update(cell, meta, file.schema)
        batches = _batches(file, cell.prefix(meta.generation), 0, _batch_rows(cell, file, options), lambda: None)
        added: deque[int] = deque()
        with closing(_written(cell, _counting_new(cell, batches, added), options, 0)) as written:
            for done in written:
                _grow(cell, meta.generation, added.popleft())
                progress(done, file.rows, "updating")
        cell.read()
        _grow(cell, meta.generation, 0)
    except StoreFailure as failure:
        raise StoreFailure(
            f"{failure}. {done:,} of {file.rows:,} rows are updated; run the same command again for all of them",
            failure.trouble,
        ) from failure
    return meta.generation


def _check_update(cell: MetaCell, meta: TableMeta, schema: RowSchema) -> None:
    if meta.schema is None:
        raise DataError(f"{cell.name} has no rows to update; load it without --update first")
    if meta.schema != schema:
        raise DataError(
            f"{cell.name} was loaded with version {meta.schema.version} of its schema, and an update has to have the "
            f"same one; load all rows without --update to change it"
        )


def _grow(cell: MetaCell, generation: int, added: int) -> None:
    """Count rows that were not there before."""

    def step(meta: TableMeta) -> TableMeta:
        if meta.generation != generation:
            raise DataError(f"{cell.name} was loaded anew while this update ran; run the update again")
        return msgspec.structs.replace(meta, rows=meta.rows + added)

    cell.change(step)


def _counting_new(cell: MetaCell, batches: Iterator[list[Pair]], added: deque[int]) -> Iterator[list[Pair]]:
    """The batches, with how many rows of each were not there before put behind `added`."""
    for pairs in batches:
        ask = partial(cell.store.get, [key for key, _ in pairs])
        added.append(cell.patience.answer(ask(), ask).count(None))
        yield pairs


def _check_all_there(cell: MetaCell, claim: TableClaim, loading: Loading) -> None:
    """A store that was restarted or evicts keys may have lost what it had acknowledged."""
    missing = loading.rows - cell.count(loading.generation, claim.beat)
    if missing:
        claim.advance(0)
        raise DataError(
            f"{missing:,} of {loading.rows:,} rows of {cell.name} are not in the store any more; it was restarted "
            f"without its data, or its memory policy threw them away. Readers see the rows before. Mend it and run "
            f"this again"
        )


def _batch_rows(cell: MetaCell, file: RowFile, options: LoadOptions) -> int:
    rows = options.batch_rows or (LOCAL_BATCH_ROWS if cell.store.local else BATCH_ROWS)
    return max(min(rows, BATCH_BYTES // file.schema.row_bytes), 1)


def _batches(file: RowFile, prefix: bytes, first: int, step: int, beat: Callable[[], None]) -> Iterator[list[Pair]]:
    """Keys and packed rows, `step` rows at a time, of the file's rows from `first` on."""
    size = file.schema.row_bytes
    for frame in file.chunks(first):
        packed = pack_rows(file.schema, frame, int(time.time()))
        beat()
        for start in range(0, len(packed.ids), step):
            ids = packed.ids[start : start + step]
            raw = packed.words[start : start + step].tobytes()
            yield [
                (row_key(prefix, identity), raw[size * number : size * (number + 1)])
                for number, identity in enumerate(ids)
            ]


def _written(
    cell: MetaCell, batches: Iterator[Sequence[Pair]], options: LoadOptions, first: int
) -> Generator[int, None, None]:
    """Write batches, several at once; yields how many rows are written, without a gap, after each of them.

    None is on its way any more when it is closed.
    """
    waiting: deque[tuple[Future[None], Sequence[Pair]]] = deque()
    most = 1 if cell.store.local else options.in_flight

    def settle() -> int:
        asked, pairs = waiting.popleft()
        cell.patience.answer(asked, lambda: cell.store.put(pairs))
        return len(pairs)

    try:
        for batch in batches:
            waiting.append((cell.store.put(batch), batch))
            if len(waiting) >= most:
                first += settle()
                yield first
        while waiting:
            first += settle()
            yield first
    finally:
        wait([asked for asked, _ in waiting])
