"""Whoever looks up and pools: tables in this process, or shards elsewhere. The model does not know which."""

from __future__ import annotations

from typing import Protocol

from rankd.embeddings.jagged import JaggedIds
from rankd.types import Float32Array


class Pooling(Protocol):
    """Sums of embeddings."""

    def pool(self, asked: JaggedIds) -> Float32Array:
        """(B, W) float32: of each sample the sums of its rows, table beside table in the order asked, W the sum of
        their widths; zeros where there are no ids.

        Raises:
            InvalidRequest: an unknown table, offsets that do not fit, or an id outside of its table.
        """
        ...
