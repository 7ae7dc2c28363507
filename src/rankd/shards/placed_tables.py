"""The tables of a model where a plan put them: some in this process, the others on shards.

In: JaggedIds over any of them. Out: their sums side by side. Shards are asked first; tables here are looked up while
they work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.local_tables import LocalTables
from rankd.embeddings.pooling import Pooled
from rankd.shards.shard_layout import ShardLayout
from rankd.shards.sharded_pooling import ShardedPooling


class PlacedTables:
    """A `TableSource` over tables here and the shards of a layout. Thread-safe."""

    def __init__(self, here: LocalTables, layout: ShardLayout, sharded: ShardedPooling) -> None:
        self._here, self._sharded = here, sharded
        self._own = frozenset(here.tables)
        self._dims = {name: table.spec.dim for name, table in here.tables.items()}
        self._dims |= {spec.name: spec.dim for net in layout.nets for spec in net.tables}

    def look_up(self, asked: JaggedIds, deadline: float | None = None) -> Pooled:
        """The sums; see `TableSource.look_up`."""
        here = [place for place, name in enumerate(asked.tables) if name in self._own]
        if len(here) == len(asked.tables):
            return self._here.look_up(asked)
        away = [place for place, name in enumerate(asked.tables) if name not in self._own]
        pending = self._sharded.begin(_some(asked, away), deadline)
        own = self._here.pool(_some(asked, here)) if here else None
        pooled = pending.result()
        if own is None:
            return pooled
        dims = [self._dims[name] for name in asked.tables]
        starts = np.cumsum([0, *dims])
        values = np.empty((asked.num_samples, starts[-1]), np.float32)
        for sums, places in ((own, here), (pooled.values, away)):
            first = 0
            for place in places:
                values[:, starts[place] : starts[place + 1]] = sums[:, first : first + dims[place]]
                first += dims[place]
        return Pooled(values, pooled.degraded)

    def calls(self) -> Mapping[str, int]:
        """Calls of shards since the start, by what became of them."""
        return self._sharded.counts()

    def replicas_up(self) -> Mapping[str, int]:
        """How many replicas of each shard can be asked."""
        return self._sharded.replicas_up()

    def generation(self) -> int:
        """0: they stay where they are."""
        return 0

    def wait_up(self, within_s: float) -> None:
        """See `ShardedPooling.wait_up`."""
        self._sharded.wait_up(within_s)

    def close(self) -> None:
        """End all connections."""
        self._sharded.close()
        self._here.close()


def _some(asked: JaggedIds, places: Sequence[int]) -> JaggedIds:
    """The tables at these places alone."""
    samples = asked.num_samples
    spans = [asked.offsets[place * samples : (place + 1) * samples + 1] for place in places]
    ids = [asked.ids[span[0] : span[-1]] for span in spans]
    counts = [np.diff(span) for span in spans]
    offsets = np.zeros(len(places) * samples + 1, np.int64)
    np.cumsum(np.concatenate(counts), out=offsets[1:])
    return JaggedIds(tuple(asked.tables[place] for place in places), offsets, np.concatenate(ids))
