"""Embedded features: sums of rows of tables that are not in the graph, written where the graph reads them.

In: the packed columns of a request (`assembly.py`), so that fresh values of a feature store count too; and whoever
looks up and pools (`embeddings.pooling`): tables here, or shards elsewhere. Out: `context_embedded` and
`candidate_embedded`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from types import ModuleType

import numpy as np

from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.pooling import Pooled, TableSource
from rankd.features.schema import Categorical, EmbeddedFeature, EmbeddedSide, FeatureSchema
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
        self._histories = tuple(one for one in self._shared if one.side is EmbeddedSide.HISTORY)

    def fill_candidates(self, into: Mapping[str, Array], count: int, deadline: float | None = None) -> tuple[str, ...]:
        """Write candidate_embedded (1, C, W) of the first `count` candidates from their rows and codes; zeros follow.
        Names the tables that could not be had.

        Raises:
            InvalidRequest, DeadlineExceeded, Unavailable: see `TableSource.look_up`.
        """
        if "candidate_embedded" not in into:
            return ()
        rows = into["candidate_item"][0, :count]
        codes = into["candidate_categories"][0, :count] if "candidate_categories" in into else _no_codes(count)
        sums = into["candidate_embedded"][0]
        pooled = self._tables.look_up(self._own.asked(rows, codes), deadline)
        sums[:count] = pooled.values
        sums[count:] = 0.0
        return pooled.degraded

    def context(
        self, history: Mapping[str, Array], candidates: Mapping[str, Array], deadline: float | None = None
    ) -> Pooled:
        """context_embedded (1, W) of a request's history tokens and its user's codes.

        Raises:
            InvalidRequest, DeadlineExceeded, Unavailable: see `TableSource.look_up`.
        """
        tables, ids = [], list[Int64Array]()
        for feature in self._histories:
            length = int(history["history_length"][0, feature.index])
            rows = history["history_item"][0, feature.index, :length]
            tables.append(feature.table)
            ids.append(rows[rows > 0].astype(np.int64))
        if self._user.tables:
            asked = self._user.asked(np.zeros(1, np.int32), candidates["context_categories"])
            tables += self._user.tables
            ids += np.split(asked.ids, asked.offsets[1:-1])
        offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        whole = np.concatenate(ids) if ids else np.zeros(0, np.int64)
        return self._tables.look_up(JaggedIds(tuple(tables), offsets, whole), deadline)

    def embed(self, features: Features) -> Features:
        """Packed features with their embedded inputs: what checks and offline evaluation feed a graph."""
        candidates = dict(features.candidates)
        padded = candidates["candidate_item"].shape[1]
        if self._own.tables:
            candidates["candidate_embedded"] = np.zeros((1, padded, self._own.width), np.float32)
            self.fill_candidates(candidates, padded)
        if self._shared:
            candidates["context_embedded"] = self.context(features.history, candidates).values
        return Features(features.history, candidates, features.num_candidates)


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


def _no_codes(count: int) -> Int32Array:
    return np.zeros((count, 0), np.int32)


@cache
def _kernels() -> ModuleType:
    """Imported when it is first needed: it brings numba, which takes half a second."""
    from rankd.features import embedding_kernels

    return embedding_kernels
