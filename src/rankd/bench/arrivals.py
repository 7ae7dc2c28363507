"""When requests come, in an open loop: exponential gaps, or those of a recording.

In: a rate, a duration, a seed. Out: ascending seconds from the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import polars as pl

from rankd.errors import DataError
from rankd.types import Array

FEWEST = 10
"""Moments that make a recording."""


class Arrivals(Protocol):
    """A law of arrival times."""

    @property
    def name(self) -> str:
        """For the report."""
        ...

    def times(self, rate: float, seconds: float, seed: int) -> list[float]:
        """Moments in 0..seconds, `rate` a second on average."""
        ...


@dataclass(frozen=True, slots=True)
class Poisson:
    """Requests that know nothing of each other: gaps are exponential."""

    name: str = "poisson"

    def times(self, rate: float, seconds: float, seed: int) -> list[float]:
        """Moments in 0..seconds of a Poisson process."""
        return poisson_arrivals(rate, seconds, seed)


POISSON = Poisson()


@dataclass(frozen=True, slots=True)
class Recorded:
    """The gaps of a recording (n,) seconds, stretched to the wanted rate: its bursts stay bursts. The seed says where
    it begins; behind its end it begins again."""

    name: str
    gaps: Array

    def times(self, rate: float, seconds: float, seed: int) -> list[float]:
        """Moments in 0..seconds; the rate is that of the whole recording, a part of it may be busier."""
        start = int(np.random.default_rng(seed).integers(len(self.gaps)))
        gaps = np.roll(self.gaps, -start) / (self.gaps.mean() * rate)
        rounds = int(np.ceil(seconds / gaps.sum())) + 1
        moments = np.cumsum(np.tile(gaps, rounds))
        return [float(moment) for moment in moments[moments < seconds]]


def read_arrivals(path: Path, column: str) -> Recorded:
    """A recording: a Parquet or CSV file with a column of moments, as dates and times or as seconds, in any order.

    Raises:
        DataError: no such file or column, another type, fewer than FEWEST moments, or all at once.
    """
    readers = {".parquet": pl.read_parquet, ".csv": lambda file: pl.read_csv(file, try_parse_dates=True)}
    if path.suffix not in readers:
        raise DataError(f"{path}: unknown format '{path.suffix}'; a recording is .parquet or .csv")
    try:
        frame = readers[path.suffix](path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path}: it cannot be read: {error}") from error
    if column not in frame.columns:
        raise DataError(f"{path}: there is no column '{column}'; it has {', '.join(frame.columns)}")
    moments = frame[column].drop_nulls()
    if moments.dtype == pl.Datetime:
        moments = moments.dt.epoch("us") / 1e6
    elif not moments.dtype.is_numeric():
        raise DataError(f"{path}: column '{column}' is {moments.dtype}; moments are dates with times, or seconds")
    ordered = np.sort(moments.to_numpy().astype(np.float64))
    if len(ordered) < FEWEST or not np.isfinite(ordered).all() or ordered[0] == ordered[-1]:
        raise DataError(
            f"{path}: column '{column}' has {len(ordered)} moments from {ordered[:1]} to {ordered[-1:]}; a recording "
            f"has at least {FEWEST} finite ones that are not all the same"
        )
    return Recorded(path.name, np.diff(ordered))


def poisson_arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Arrival times in 0..seconds of a Poisson process: gaps are exponential with mean 1 / rate."""
    random = np.random.default_rng(seed)
    times: list[float] = []
    last = 0.0
    while last < seconds:
        chunk = last + np.cumsum(random.exponential(1.0 / rate, max(int(rate * seconds * 0.1), 64)))
        times.extend(chunk.tolist())
        last = times[-1]
    return [moment for moment in times if moment < seconds]
