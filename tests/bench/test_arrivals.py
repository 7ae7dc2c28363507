"""When requests come: laws that follow their seed and rate, and recordings that are read or refused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from rankd.bench.arrivals import POISSON, Recorded, poisson_arrivals, read_arrivals
from rankd.errors import DataError


def test_poisson_arrivals() -> None:
    times = np.asarray(poisson_arrivals(rate=500.0, seconds=100.0, seed=3))
    assert times.tolist() == POISSON.times(rate=500.0, seconds=100.0, seed=3)
    assert times.tolist() != poisson_arrivals(rate=500.0, seconds=100.0, seed=4)
    gaps = np.diff(times)
    assert gaps.min() > 0
    assert times[0] >= 0
    assert times[-1] < 100.0
    assert len(times) == pytest.approx(50_000, rel=0.02)
    assert gaps.mean() == pytest.approx(1 / 500, rel=0.02)
    assert gaps.std() == pytest.approx(1 / 500, rel=0.03)  # of an exponential law
    assert np.mean(gaps > 1 / 500) == pytest.approx(np.exp(-1), abs=0.01)


def test_a_recording_keeps_its_bursts_at_any_rate() -> None:
    recorded = Recorded("two and a pause", np.array([1.0, 1.0, 10.0]))
    for rate in (0.5, 40.0):
        times = recorded.times(rate, seconds=300 / rate, seed=0)
        assert len(times) == pytest.approx(300, abs=3)
        gaps = np.diff(times)
        assert sorted(set(np.round(gaps * rate, 6))) == [0.25, 2.5]
    assert recorded.times(4.0, 10.0, seed=0) == recorded.times(4.0, 10.0, seed=0)
    starts = {tuple(np.round(np.diff(recorded.times(4.0, 2.0, seed)), 6)) for seed in range(20)}
    assert len(starts) == 3  # it begins anywhere


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("dates", [True, False])
def test_recordings_are_files(tmp_path: Path, suffix: str, dates: bool) -> None:
    moments = [0.0, 0.5, 0.25, 3.0, *(10.0 + number for number in range(8))]
    start = datetime(2026, 1, 5, tzinfo=UTC)
    column = [start + timedelta(seconds=moment) for moment in moments] if dates else moments
    frame, path = pl.DataFrame({"at": column}), tmp_path / f"visits{suffix}"
    if suffix == ".csv":
        frame.write_csv(path)
    else:
        frame.write_parquet(path)
    recorded = read_arrivals(path, "at")
    assert recorded.name == path.name
    assert recorded.gaps == pytest.approx(np.diff(sorted(moments)))


@pytest.mark.parametrize(
    ("content", "column", "message"),
    [
        ("time\n1\n2\n", "time", "at least 10"),
        ("time\n" + "7\n" * 20, "time", "not all the same"),
        ("time\n" + "x\n" * 20, "time", "dates with times, or seconds"),
        ("at\n1\n", "time", "no column 'time'; it has at"),
    ],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, content: str, column: str, message: str) -> None:
    path = tmp_path / "visits.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_arrivals(path, column)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown format"):
        read_arrivals(tmp_path / "visits.txt", "time")
    broken = tmp_path / "visits.parquet"
    broken.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read"):
        read_arrivals(broken, "time")
