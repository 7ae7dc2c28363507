"""Embedded features: sums of rows of tables that are not in the graph, written where the graph reads them.

In: the packed columns of a request (`assembly.py`), so that fresh values of a feature store count too; and whoever
looks up and pools (`embeddings.pooling`): tables here, or shards elsewhere. Out: `context_embedded` and
`candidate_embedded`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from types import ModuleType

import numpy as np

from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.pooling import Pooled, TableSource
from rankd.features.schema import Categorical, EmbeddedFeature, EmbeddedSide, FeatureSchema
from rankd.observe.table_metrics import TableFigures
from rankd.types import Array, Features, Int32Array, Int64Array

OWN_ROW = (-1, 0, 0)


class EmbeddedInputs:
    """The embedded features of a schema. Thread-safe as far as `tables` is."""

    def __init__(self, schema: FeatureSchema, tables: TableSource) -> None:
        self._tables = tables
        self._own = _Columns(schema.candidate_embedded, schema.item_categorical)
        self._shared = schema.context_embedded
        users = tuple(one for one in self._shared if one.side is EmbeddedSide.USER_COLUMN)
        self._user = _Columns(users, schema.user_categorical)
        self._lookups, self._seconds = 0, 0.0
        self._lock = threading.Lock()  # guards those two

    def fill(
        self, into: Mapping[str, Array], history: Mapping[str, Array], deadline: float | None = None
    ) -> tuple[str, ...]:
        """Write candidate_embedded (1, C, W) and context_embedded (1, W) from the ids and codes of all C candidates, of
        the user, and of the history's tokens. Names the tables that could not be had.

        Raises:
            InvalidRequest, DeadlineExceeded, Unavailable: see `TableSource.look_up`.
        """
        lost = list[str]()
        if "context_embedded" in into:
            context = self._look_up(self._context(history, into), deadline)
            into["context_embedded"][...] = context.values
            lost += context.degraded
        if "candidate_embedded" in into:
            rows = into["candidate_item"][0]
            codes = into["candidate_categories"][0] if "candidate_categories" in into else _no_codes(len(rows))
            own = self._look_up(self._own.asked(rows, codes), deadline)
            into["candidate_embedded"][0] = own.values
            lost += own.degraded
        return tuple(dict.fromkeys(lost))

    def embed(self, features: Features) -> Features:
        """Packed features with their embedded inputs: what checks and offline evaluation feed a graph."""
        candidates = dict(features.candidates)
        if self._own.tables:
            padded = candidates["candidate_item"].shape[1]
            candidates["candidate_embedded"] = np.zeros((1, padded, self._own.width), np.float32)
        if self._shared:
            width = sum(feature.dim for feature in self._shared)
            candidates["context_embedded"] = np.zeros((1, width), np.float32)
        self.fill(candidates, features.history)
        return Features(features.history, candidates, features.num_candidates)

    def figures(self) -> TableFigures:
        """What was looked up so far."""
        with self._lock:
            lookups, seconds = self._lookups, self._seconds
        return TableFigures(
            lookups, seconds, self._tables.calls(), self._tables.replicas_up(), self._tables.generation()
        )

    def close(self) -> None:
        """Nothing is looked up after this."""
        self._tables.close()

    def _look_up(self, asked: JaggedIds, deadline: float | None) -> Pooled:
        started = time.perf_counter()
        try:
            return self._tables.look_up(asked, deadline)
        finally:
            with self._lock:
                self._lookups += 1
                self._seconds += time.perf_counter() - started

    def _context(self, history: Mapping[str, Array], candidates: Mapping[str, Array]) -> JaggedIds:
        """The ids of a request, as of one sample."""
        of_columns = iter(self._column_ids(candidates))
        ids = [
            _history_ids(history, feature.index) if feature.side is EmbeddedSide.HISTORY else next(of_columns)
            for feature in self._shared
        ]
        offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        return JaggedIds(tuple(feature.table for feature in self._shared), offsets, np.concatenate(ids))

    def _column_ids(self, candidates: Mapping[str, Array]) -> list[Int64Array]:
        """Of each of the user's columns."""
        if not self._user.tables:
            return []
        asked = self._user.asked(np.zeros(1, np.int32), candidates["context_categories"])
        return np.split(asked.ids, asked.offsets[1:-1])


def copy_candidates(whole: Mapping[str, Array], into: Mapping[str, Array], first: int, count: int) -> None:
    """Write the columns of candidates first..first + count - 1 of a request, and what it has in common; zeros follow
    them."""
    for name, array in into.items():
        if name.startswith("candidate_"):
            array[0, :count] = whole[name][0, first : first + count]
            array[0, count:] = 0
    if "context_embedded" in into:
        into["context_embedded"][...] = whole["context_embedded"]


class _Columns:
    """Features of rows and of their categorical columns: where each of them stands."""

    def __init__(self, features: Sequence[EmbeddedFeature], columns: Sequence[Categorical]) -> None:
        ends = list(accumulate(column.width for column in columns))
        places = [(end - column.width, end, column.offset) for column, end in zip(columns, ends, strict=True)]
        mine = [OWN_ROW if one.side is EmbeddedSide.ITEM else places[one.index] for one in features]
        self.tables = tuple(one.table for one in features)
        self.width = sum(one.dim for one in features)
        self._places = np.asarray(mine, np.int64).reshape(-1, 3)
        self._most = sum(max(last - first, 1) for first, last, _ in mine)

    def asked(self, rows: Int32Array, codes: Array) -> JaggedIds:
        """The ids of samples with these rows (n,) and codes (n, G)."""
        count = len(rows)
        offsets, ids = np.empty(len(self.tables) * count + 1, np.int64), np.empty(self._most * count, np.int64)
        used = _kernels().write_ids(rows, codes, self._places, offsets, ids)
        return JaggedIds(self.tables, offsets, ids[:used])


def _history_ids(history: Mapping[str, Array], block: int) -> Int64Array:
    rows = history["history_item"][0, block, : int(history["history_length"][0, block])]
    return rows[rows > 0].astype(np.int64)


def _no_codes(count: int) -> Int32Array:
    return np.zeros((count, 0), np.int32)


@cache
def _kernels() -> ModuleType:
    """Imported when it is first needed: it brings numba, which takes half a second."""
    from rankd.features import embedding_kernels

    return embedding_kernels
