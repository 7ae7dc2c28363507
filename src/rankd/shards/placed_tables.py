"""The tables of a model where a plan put them: some in this process, the others on shards.

In: questions over any of them. Out: their sums side by side. Shards are asked first; tables here are looked up when
somebody finishes, while they work if that is soon enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.local_tables import LocalTables
from rankd.embeddings.pooling import LookUp
from rankd.shards.pending import Pending
from rankd.shards.shard_layout import ShardLayout
from rankd.shards.sharded_pooling import ShardedPooling
from rankd.types import Float32Array, Int64Array


class PlacedTables:
    """A `TableSource` over tables here and the shards of a layout. Thread-safe."""

    def __init__(self, here: LocalTables, layout: ShardLayout, sharded: ShardedPooling) -> None:
        self._here, self._sharded = here, sharded
        self._own = frozenset(here.tables)
        self._dims = {name: table.spec.dim for name, table in here.tables.items()}
        self._dims |= {spec.name: spec.dim for net in layout.nets for spec in net.tables}

    @property
    def local(self) -> bool:
        """Shards are waited for."""
        return False

    def begin(self, asked: Sequence[JaggedIds], into: Sequence[Float32Array], deadline: float | None = None) -> LookUp:
        """See `TableSource.begin`."""
        here, away = list[_Question](), list[_Question]()
        for one, out in zip(asked, into, strict=True):
            own = [place for place, name in enumerate(one.tables) if name in self._own]
            others = [place for place, name in enumerate(one.tables) if name not in self._own]
            here += [self._question(one, own, out)] if own else []
            away += [self._question(one, others, out)] if others else []
        pending = self._sharded.begin([question.asked for question in away], deadline)
        return _PlacedLookUp(self._here, here, pending, away)

    def _question(self, asked: JaggedIds, places: Sequence[int], out: Float32Array) -> _Question:
        ends = np.cumsum([0, *(self._dims.get(name, 0) for name in asked.tables)])
        columns = np.stack([ends[:-1], ends[1:]], axis=1)[list(places)]
        return _Question(asked if len(places) == len(asked.tables) else _some(asked, places), columns, out)

    def calls(self) -> Mapping[str, int]:
        """Calls of shards since the start, by what became of them."""
        return self._sharded.counts()

    def replicas_up(self) -> Mapping[str, int]:
        """How many replicas of each shard can be asked."""
        return self._sharded.replicas_up()

    def generation(self) -> int:
        """0: they stay where they are."""
        return 0

    def contents(self) -> Mapping[str, str]:
        """Of the tables here and of those on shards; see `TableSource.contents`."""
        return {**self._sharded.contents(), **self._here.contents()}

    def wait_up(self, within_s: float) -> None:
        """See `ShardedPooling.wait_up`."""
        self._sharded.wait_up(within_s)

    def rows(self) -> Mapping[str, int]:
        """See `TableSource.rows`."""
        return self._sharded.rows()

    def kept_bytes(self) -> int:
        """Of the hot rows that are kept here."""
        return self._sharded.kept_bytes()

    def close(self) -> None:
        """End all connections."""
        self._sharded.close()
        self._here.close()


@dataclass(frozen=True, slots=True)
class _Question:
    """Tables that are in one place, and where their sums go: those of the f-th into columns[f, 0] to columns[f, 1]."""

    asked: JaggedIds
    columns: Int64Array
    out: Float32Array


class _PlacedLookUp:
    """What `PlacedTables.begin` gives."""

    def __init__(
        self, tables: LocalTables, here: Sequence[_Question], pending: Pending, away: Sequence[_Question]
    ) -> None:
        self._tables, self._here, self._pending, self._away = tables, here, pending, away

    def there(self) -> bool:
        """Whether all shards have answered, or their time is over."""
        return self._pending.there()

    def when_there(self, then: Callable[[], None]) -> None:
        """Call `then` once when that is so."""
        self._pending.when_there(then)

    def finish(self) -> tuple[str, ...]:
        """See `LookUp.finish`."""
        for one in self._here:
            self._tables.pool_into(one.asked, one.out, np.ascontiguousarray(one.columns[:, 0]))
        return self._pending.add_up([one.out for one in self._away], [one.columns for one in self._away])

    def forget(self) -> None:
        """Whoever is still asked need not answer."""
        self._pending.forget()


def _some(asked: JaggedIds, places: Sequence[int]) -> JaggedIds:
    """The tables at these places alone."""
    samples = asked.num_samples
    spans = [asked.offsets[place * samples : (place + 1) * samples + 1] for place in places]
    ids = [asked.ids[span[0] : span[-1]] for span in spans]
    counts = [np.diff(span) for span in spans]
    offsets = np.zeros(len(places) * samples + 1, np.int64)
    np.cumsum(np.concatenate(counts), out=offsets[1:])
    return JaggedIds(tuple(asked.tables[place] for place in places), offsets, np.concatenate(ids))
