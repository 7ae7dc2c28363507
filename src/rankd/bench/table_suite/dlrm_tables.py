"""The tables of MLPerf's DLRM-DCNv2 (26, of Criteo's click logs), made smaller, and requests for them.

In: a factor and a seed. Out: `TableSpec`s, rows, and `JaggedIds`. Each sample asks every table for a fixed number of
ids, 214 in all, drawn uniformly: the worst case for caches, where real logs repeat their popular ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.table_spec import TableSpec, TableStorage
from rankd.types import Float32Array

# fmt: off
ROWS = (
    40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10, 2_209, 11_938,
    155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36,
)
IDS = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
"""Of a sample, in each table."""
# fmt: on
_BLOCK_ROWS = 1 << 16


def dlrm_specs(storage: TableStorage, smaller: int, dim: int) -> list[TableSpec]:
    """The tables with a `smaller`-th of their rows, one at least."""
    return [TableSpec(f"t{f}", max(rows // smaller, 1), dim, storage) for f, rows in enumerate(ROWS)]


def drawn_rows(spec: TableSpec, seed: int) -> Iterator[Float32Array]:
    """Blocks of a table's rows, uniform in -1..1."""
    random = np.random.default_rng((seed, *spec.name.encode()))
    for first in range(0, spec.rows, _BLOCK_ROWS):
        yield 2 * random.random((min(_BLOCK_ROWS, spec.rows - first), spec.dim), np.float32) - 1


def drawn_requests(specs: Sequence[TableSpec], samples: int, count: int, seed: int) -> list[JaggedIds]:
    """`count` requests of so many samples for all tables."""
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(np.repeat(IDS, samples))]).astype(np.int64)
    names = tuple(spec.name for spec in specs)
    return [
        JaggedIds(
            names,
            offsets,
            np.concatenate(
                [random.integers(0, spec.rows, ids * samples) for spec, ids in zip(specs, IDS, strict=True)]
            ),
        )
        for _ in range(count)
    ]
