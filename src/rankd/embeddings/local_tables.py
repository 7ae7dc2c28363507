"""Tables in this process, looked up and pooled: the nearest implementation of `pooling.Pooling`.

In: `Table`s (`table_file.py`), and ids (`jagged.py`). Out: sums (B, W) float32. `table_kernels.py` has the loops.

With several threads the bags, in the order table by table and sample by sample, are cut into spans of about as many
ids each; the caller and its helpers (`lookup_threads.py`) take one span after the other. A bag is summed by one thread
in the order of its ids, so the sums are the same for every number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType

import numpy as np

from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.pooling import LookUp
from rankd.embeddings.table_file import Table
from rankd.embeddings.table_layout import COLUMN, DIM, FIELDS, layout
from rankd.errors import ConfigError, InvalidRequest, nearest
from rankd.types import Array, Float32Array, Int64Array

SPANS_A_THREAD = 16
"""More spans than threads, so that nobody is waited for long: neither who began late nor who was interrupted."""
LEAST_IDS = 1024
"""Of a span, on average: 15 to 40 us of work."""
SHARED_IDS = 8192
"""Of a look-up that is shared, at least: 100 to 300 us of work. To wake a thread takes 20 to 40."""


class LocalTables:
    """Pools rows of tables with `threads` threads. Thread-safe: any number of callers at once, who share the helpers.

    Ids of a table of which a part is open are rows of that part (`table_spec.py`). The first of a process compiles the
    loops (2 s; kept on disk for the next process).

    Raises:
        ConfigError: two tables of the same name, or no thread.
    """

    def __init__(self, tables: Iterable[Table], threads: int = 1) -> None:
        # Imported here: they bring numba, which takes half a second.
        from rankd.embeddings import lookup_threads, table_kernels

        self._tables = tuple(tables)  # kept, for the layouts are bare addresses
        self._numbers = {table.spec.name: number for number, table in enumerate(self._tables)}
        if len(self._numbers) != len(self._tables):
            raise ConfigError(f"tables have names of their own; given: {[one.spec.name for one in self._tables]}")
        if threads < 1:
            raise ConfigError(f"{threads} threads were given; look-ups take at least 1")
        self._layouts = np.asarray([layout(table) for table in self._tables], np.int64).reshape(-1, FIELDS)
        self._kernels, self._num_threads = table_kernels, threads
        self._threads = lookup_threads.LookupThreads(threads - 1) if threads > 1 else None

    @property
    def tables(self) -> Mapping[str, Table]:
        """By name."""
        return {table.spec.name: table for table in self._tables}

    def pool(self, asked: JaggedIds) -> Float32Array:
        """(B, W) float32, see `Pooling.pool`.

        Raises:
            InvalidRequest: an unknown table, arrays that are not as `JaggedIds` says, or an id outside of its table.
        """
        ends = self.ends(asked)
        out = np.empty((asked.num_samples, int(ends[-1])), np.float32)
        self.pool_into(asked, out, ends[:-1])
        return out

    def ends(self, asked: JaggedIds) -> Int64Array:
        """(F + 1,) where the columns of each table begin when they stand side by side, and where the last ends.

        Raises:
            InvalidRequest: an unknown table.
        """
        return np.cumsum([0, *(self._layouts[self._number(name), DIM] for name in asked.tables)], dtype=np.int64)

    def pool_into(self, asked: JaggedIds, out: Float32Array, columns: Int64Array) -> None:
        """As `pool`, the sums of the f-th table into `out` (B, anything) from columns[f] on; nothing else is written.

        Raises:
            InvalidRequest: as `pool`.
        """
        if self._threads is not None and len(asked.ids) >= SHARED_IDS:
            self._threads.wake()
        _check_array("offsets", asked.offsets)
        _check_array("ids", asked.ids)
        asked.check()
        layouts = self._layouts[[self._number(name) for name in asked.tables]]
        layouts[:, COLUMN] = columns
        wrong = self._sum(layouts, np.ascontiguousarray(asked.offsets), np.ascontiguousarray(asked.ids), out)
        if wrong >= 0:
            raise self._outside(asked, wrong)

    @property
    def local(self) -> bool:
        """Nobody is waited for."""
        return True

    def begin(self, asked: Sequence[JaggedIds], into: Sequence[Float32Array], deadline: float | None = None) -> LookUp:
        """See `TableSource.begin`: looked up by `finish`, which takes no time worth a deadline."""
        return _LookUpHere(self, asked, into)

    def calls(self) -> Mapping[str, int]:
        """None: there are no shards."""
        return {}

    def replicas_up(self) -> Mapping[str, int]:
        """None: there are no shards."""
        return {}

    def generation(self) -> int:
        """0: they stay where they are."""
        return 0

    def contents(self) -> Mapping[str, str]:
        """What their files say."""
        return {table.spec.name: table.content for table in self._tables}

    def wait_up(self, within_s: float) -> None:
        """Do nothing: there are no shards to wait for."""

    def rows(self) -> Mapping[str, int]:
        """None: there are no shards."""
        return {}

    def kept_bytes(self) -> int:
        """None: there are no shards."""
        return 0

    def close(self) -> None:
        """End the helpers; calls that are under way end first."""
        if self._threads is not None:
            self._threads.close()

    def __enter__(self) -> LocalTables:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _sum(self, layouts: Int64Array, offsets: Int64Array, ids: Int64Array, out: Float32Array) -> int:
        """Write all sums; returns the first place in `ids` of an id outside of its table, or -1."""
        if self._threads is None or len(ids) < SHARED_IDS:
            wrong: int = self._kernels.sum_bags(layouts, offsets, ids, 0, len(offsets) - 1, out)
            return wrong
        return self._threads.sum(layouts, offsets, ids, _cuts(offsets, self._num_threads), out)

    def _number(self, name: str) -> int:
        number = self._numbers.get(name)
        if number is None:
            raise InvalidRequest(
                f"there is no table '{name}' here, only {list(self._numbers)}.{nearest(name, self._numbers)}"
            )
        return number

    def _outside(self, asked: JaggedIds, place: int) -> InvalidRequest:
        bag = int(np.searchsorted(asked.offsets, place, side="right")) - 1
        name = asked.tables[bag // asked.num_samples]
        rows = len(self._tables[self._numbers[name]].records)
        allowed = f" of {rows} rows: give 0 to {rows - 1}" if rows else ", which has no rows here"
        return InvalidRequest(f"id {asked.ids[place]} is not in table '{name}'{allowed}")


class _LookUpHere:
    """What `LocalTables.begin` gives."""

    def __init__(self, tables: LocalTables, asked: Sequence[JaggedIds], into: Sequence[Float32Array]) -> None:
        self._tables, self._asked, self._into = tables, asked, into

    def there(self) -> bool:
        """Always."""
        return True

    def when_there(self, then: Callable[[], None]) -> None:
        """Now."""
        then()

    def finish(self) -> tuple[str, ...]:
        """See `LookUp.finish`; nothing is ever lost."""
        for asked, out in zip(self._asked, self._into, strict=True):
            self._tables.pool_into(asked, out, self._tables.ends(asked)[:-1])
        return ()

    def forget(self) -> None:
        """Nothing is under way."""


def _check_array(name: str, array: Array) -> None:
    if array.dtype != np.int64 or array.ndim != 1:
        raise InvalidRequest(f"{name} are int64 in one dimension, not {array.dtype} of shape {array.shape}")


def _cuts(offsets: Int64Array, threads: int) -> Int64Array:
    """Where bags are cut into spans, the first and the end too: of about as many ids each, LEAST_IDS or more."""
    count = max(min(threads * SPANS_A_THREAD, int(offsets[-1]) // LEAST_IDS), 1)
    cuts = np.searchsorted(offsets, np.arange(count + 1) * (int(offsets[-1]) // count))
    cuts[0], cuts[-1] = 0, len(offsets) - 1
    return cuts
