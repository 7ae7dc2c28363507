"""Whoever looks up and pools: tables in this process, or shards elsewhere. The model does not know which."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rankd.embeddings.jagged import JaggedIds
from rankd.types import Float32Array


@dataclass(frozen=True, slots=True)
class Pooled:
    """`values` (B, W) float32 as `Pooling.pool` gives them. `degraded` names the tables, in the order asked, that could
    not be had, whose default stands in their place."""

    values: Float32Array
    degraded: tuple[str, ...] = ()


class LookUp(Protocol):
    """Sums that were asked for. Any thread may call; `finish` is called once, unless `forget` was."""

    def there(self) -> bool:
        """Whether `finish` need not wait for anybody."""
        ...

    def when_there(self, then: Callable[[], None]) -> None:
        """Call `then` once when that is so: from any thread, or now."""
        ...

    def finish(self) -> tuple[str, ...]:
        """Write the sums where `TableSource.begin` was told; names the tables that could not be had, whose defaults
        stand there.

        Raises:
            InvalidRequest: as `Pooling.pool`.
            DeadlineExceeded, Unavailable: a table without a default was not there in time, or could not be had.
        """
        ...

    def forget(self) -> None:
        """Nobody wants the sums any more; nothing, if they are there."""
        ...


class TableSource(Protocol):
    """What a ranker knows of the tables that are not in its graph."""

    @property
    def local(self) -> bool:
        """Whether nobody is ever waited for, so that there is nothing to begin early."""
        ...

    def begin(self, asked: Sequence[JaggedIds], into: Sequence[Float32Array], deadline: float | None = None) -> LookUp:
        """Look up several questions, of any numbers of samples, together: of each the sums (B, W) as `Pooling.pool`
        gives them, into its array, by `deadline` (seconds of `time.perf_counter`). Does not wait.

        Raises:
            InvalidRequest: as `Pooling.pool`; here, or by `finish`.
        """
        ...

    def calls(self) -> Mapping[str, int]:
        """Calls of shards since the start, by what became of them; empty where there are none."""
        ...

    def replicas_up(self) -> Mapping[str, int]:
        """How many replicas of each shard can be asked; empty where there are none."""
        ...

    def generation(self) -> int:
        """Which of the placements that followed each other is in use alone; 0 where tables stay where they are."""
        ...

    def contents(self) -> Mapping[str, str]:
        """Which rows each table has, as a fingerprint (`table_format.py`); empty for a table of which nobody can say,
        or whose replicas have different ones. Of a shard that is away it is what it said last."""
        ...

    def wait_up(self, within_s: float) -> None:
        """Do nothing if each shard can be asked, at one replica at least, within this time.

        Raises:
            ShardFailure: one cannot.
        """
        ...

    def rows(self) -> Mapping[str, int]:
        """Rows of shards' tables that were looked up since the start: there ("shards") or, being hot, here ("kept");
        empty where there are no shards."""
        ...

    def kept_bytes(self) -> int:
        """Of those that are kept here."""
        ...

    def close(self) -> None:
        """Nothing is asked for after this."""
        ...


class Pooling(Protocol):
    """Sums of embeddings."""

    def pool(self, asked: JaggedIds) -> Float32Array:
        """(B, W) float32: of each sample the sums of its rows, table beside table in the order asked, W the sum of
        their widths; zeros where there are no ids.

        Raises:
            InvalidRequest: an unknown table, offsets that do not fit, or an id outside of its table.
        """
        ...
