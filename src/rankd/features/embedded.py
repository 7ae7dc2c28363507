"""Embedded features: sums of rows of tables that are not in the graph, written where the graph reads them.

In: the packed columns of a request (`assembly.py`), so that fresh values of a feature store count too; and whoever
looks up and pools (`embeddings.pooling`): tables here, or shards elsewhere. Out: `context_embedded`,
`candidate_embedded` and `history_embedded`; which tokens of a history need the last is known by `token_rows.py`.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import accumulate
from types import ModuleType

import numpy as np

from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.pooling import LookUp, TableSource
from rankd.features.schema import Categorical, EmbeddedFeature, EmbeddedSide, FeatureSchema
from rankd.observe.table_metrics import TableFigures
from rankd.observe.tracing import OpenSpan
from rankd.types import Array, Features, Float32Array, Int32Array, Int64Array

OWN_ROW = (-1, 0, 0)
ONE_COLUMN = (EmbeddedSide.ITEM_COLUMN, EmbeddedSide.USER_COLUMN)
FINGERPRINT_BYTES = 16

_Place = tuple[int, int, int]


class EmbeddedInputs:
    """The embedded features of a schema. Thread-safe as far as `tables` is."""

    def __init__(self, schema: FeatureSchema, tables: TableSource) -> None:
        self._tables = tables
        self._own = _Columns(schema.candidate_embedded, schema.item_categorical)
        self._token = _Columns(schema.history_embedded, schema.item_categorical)
        self._shared = schema.context_embedded
        users = tuple(one for one in self._shared if one.side is not EmbeddedSide.HISTORY)
        self._user = _Columns(users, schema.user_categorical)
        self._lookups, self._seconds = 0, 0.0
        self._lock = threading.Lock()  # guards those two

    @property
    def local(self) -> bool:
        """Whether nobody is ever waited for."""
        return self._tables.local

    @property
    def token_tables(self) -> tuple[str, ...]:
        """Those that tokens of a history are looked up in, which a user's state depends on; often none."""
        return self._token.tables

    def token_contents(self) -> bytes:
        """Which rows those have now, as a fingerprint; empty if nobody can say."""
        contents, digest = self._tables.contents(), blake2b(digest_size=FINGERPRINT_BYTES)
        for name in self._token.tables:
            if not contents.get(name):
                return b""
            digest.update(f"{name} {contents[name]} ".encode())
        return digest.digest()

    def begin(
        self,
        into: Mapping[str, Array],
        history: Mapping[str, Array],
        deadline: float | None = None,
        span: OpenSpan | None = None,
    ) -> EmbeddedLookUp:
        """Look up what `finish` writes into those of candidate_embedded (1, C, W), context_embedded (1, W) and
        history_embedded (1, N, T, W), without gaps, that are there: by the ids and codes beside them of all C
        candidates, of the user and of tokens, and by the tokens of `history` where these are pooled. An item that is
        there twice is looked up once. `span` ends when it is finished.

        Raises:
            InvalidRequest: see `TableSource.begin`.
        """
        started = time.perf_counter()
        asked, sums, repeated = list[JaggedIds](), list[Float32Array](), list[_Repeated]()
        if "context_embedded" in into:
            asked.append(self._context(history, into))
            sums.append(into["context_embedded"])
        for side, columns in (("candidate", self._own), ("history", self._token)):
            if f"{side}_embedded" not in into:
                continue
            rows, out = into[f"{side}_item"].reshape(-1), into[f"{side}_embedded"].reshape(-1, columns.width)
            codes = into.get(f"{side}_categories", _no_codes(len(rows)))
            codes = codes.reshape(len(rows), codes.shape[-1])
            distinct, first, places = np.unique(rows, return_index=True, return_inverse=True)
            if len(distinct) < len(rows):
                own = np.empty((len(distinct), columns.width), np.float32)
                repeated.append(_Repeated(own, places, out))
                rows, codes, out = distinct, codes[first], own
            asked.append(columns.asked(rows, codes))
            sums.append(out)
        return EmbeddedLookUp(self._tables.begin(asked, sums, deadline), repeated, started, self._looked_up, span)

    def embed(self, features: Features) -> Features:
        """Packed features with their embedded inputs: what checks and offline evaluation feed a graph."""
        candidates = dict(features.candidates)
        if self._own.tables:
            padded = candidates["candidate_item"].shape[1]
            candidates["candidate_embedded"] = np.zeros((1, padded, self._own.width), np.float32)
        if self._shared:
            width = sum(feature.dim for feature in self._shared)
            candidates["context_embedded"] = np.zeros((1, width), np.float32)
        history = dict(features.history)
        if self._token.tables:
            history["history_embedded"] = np.zeros((*history["history_item"].shape, self._token.width), np.float32)
        self.begin({**candidates, **history}, history).finish()
        return Features(history, candidates, features.num_candidates)

    def figures(self) -> TableFigures:
        """What was looked up so far."""
        with self._lock:
            lookups, seconds = self._lookups, self._seconds
        tables = self._tables
        return TableFigures(
            lookups,
            seconds,
            tables.calls(),
            tables.replicas_up(),
            tables.generation(),
            tables.rows(),
            tables.kept_bytes(),
        )

    def close(self) -> None:
        """Nothing is looked up after this."""
        self._tables.close()

    def _looked_up(self, seconds: float) -> None:
        with self._lock:
            self._lookups += 1
            self._seconds += seconds

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


@dataclass(frozen=True, slots=True)
class _Repeated:
    """Sums (D, W) of different items, the place (C,) of each candidate's or token's among them, and where (C, W) they
    go."""

    sums: Float32Array
    places: Int64Array
    out: Float32Array


class EmbeddedLookUp:
    """A look-up of a request; see `LookUp`, but `finish` may be called again. `count` is told the seconds that it was
    waited for."""

    def __init__(
        self,
        lookup: LookUp,
        repeated: Sequence[_Repeated],
        started: float,
        count: Callable[[float], None],
        span: OpenSpan | None,
    ) -> None:
        self._lookup, self._repeated, self._count, self._span = lookup, repeated, count, span
        self._started, self._came = started, math.inf
        self._lost: tuple[str, ...] | None = None

    def there(self) -> bool:
        """Whether `finish` need not wait for anybody."""
        return self._lookup.there()

    def when_there(self, then: Callable[[], None]) -> None:
        """Call `then` once when that is so."""

        def came() -> None:
            self._came = time.perf_counter()
            then()

        self._lookup.when_there(came)

    def finish(self) -> tuple[str, ...]:
        """See `LookUp.finish`."""
        if self._lost is not None:
            return self._lost
        begun = time.perf_counter()
        try:
            lost = self._lookup.finish()
        finally:  # what passed in between nobody waited for the tables, but for an executor
            self._count(min(self._came, begun) - self._started + time.perf_counter() - begun)
            if self._span is not None:
                self._span.end()
        for one in self._repeated:
            np.take(one.sums, one.places, axis=0, out=one.out)
        self._lost = tuple(dict.fromkeys(lost))
        return self._lost

    def forget(self) -> None:
        """Nobody wants the sums any more."""
        self._lookup.forget()


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
        whole = (0, sum(column.width for column in columns), 1)
        mine = [_place(one, places, whole) for one in features]
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


def _place(feature: EmbeddedFeature, columns: Sequence[_Place], whole: _Place) -> _Place:
    """Where the codes of a feature stand, and the code of row 1 (`embedding_kernels.write_ids`)."""
    if feature.side in (EmbeddedSide.ITEM, EmbeddedSide.EVENT_ITEM):
        return OWN_ROW
    return columns[feature.index] if feature.side in ONE_COLUMN else whole


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
