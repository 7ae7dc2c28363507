"""What a suite says in the end: figures of contestants, the machine and the commit; one JSON object, or a table.

In: rows of figures from several rounds. Out: `Report`. The keys of the JSON object are the contract of every suite:
suite, workload, machine, commit, parity, results (one row a contestant), ratios.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rankd

if TYPE_CHECKING:
    from rich.table import Table

QUIET = 0.05
PERCENTILES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}

NOT_FIGURES = ("contestant", "loop", "threads", "users", "reason", "table", "policy", "storage")
MOST_COLUMNS = 6

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Report:
    """The result of one `rankd bench`."""

    suite: str
    workload: Mapping[str, Any]
    machine: Mapping[str, Any]
    commit: str
    parity: Mapping[str, float]
    results: Sequence[Row]
    ratios: Mapping[str, float]

    def line(self) -> str:
        """The JSON object, on one line."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps(_rounded(fields), allow_nan=False)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least `share` of them do not exceed (nearest rank): one that was measured."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


def percentiles(values: Sequence[float], name: str = "") -> dict[str, float]:
    """{"p50_ms": ..., "p99_ms": ..., "p999_ms": ...}, with "<name>_" before where a name is given."""
    before = f"{name}_" if name else ""
    return {f"{before}{key}_ms": percentile(values, share) for key, share in PERCENTILES.items()}


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each figure over rounds that have the same figures."""
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import openvino

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "openvino": openvino.__version__.split("-")[0],
    }


class Neighbours:
    """How much of the processors other programs took while we measured: figures from a busy machine are not quoted."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float | None:
        """Of all cores since the start, 0..1; None where there is no /proc/stat. Counts our ended children as ours."""
        if self._start is None or (now := self._now()) is None:
            return None
        total, busy, ours = (after - before for after, before in zip(now, self._start, strict=True))
        return max(busy - ours, 0.0) / total if total else 0.0

    def _now(self) -> tuple[float, float, float] | None:
        """Seconds of all cores: in all, busy, and of this process and its children."""
        try:
            words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]  # guests are counted in user already
        except OSError:
            return None
        ticks = [int(word) / os.sysconf("SC_CLK_TCK") for word in words]
        ours = sum(os.times()[:4])
        return sum(ticks), sum(ticks) - ticks[3] - ticks[4], ours


def commit() -> str:
    """`git describe` of the checkout that the package lies in; the package's version outside of one."""
    folder = Path(rankd.__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return rankd.__version__
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--tags"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return rankd.__version__


def print_report(report: Report) -> None:
    """Tables for people on standard output."""
    from rich.console import Console

    console = Console(width=None if os.isatty(1) else 140)
    about = report.workload
    served = ", ".join(f"{name} {_cell(value)}" for name, value in about["served"].items())
    console.print(f"{report.suite}, workload {about['name']}: {about['use']}; served: {served}")
    flops = ", ".join(f"{amount / 1e9:.3g} {name}" for name, amount in about["flops"].items())
    console.print(
        f"GFLOP a request: {flops}; on {report.machine['cpu']}, {report.machine['cores']} cores; {report.commit}"
    )
    for title in dict.fromkeys(_title(row, about["runs"]) for row in report.results):
        rows = [row for row in report.results if _title(row, about["runs"]) == title]
        console.print(_table(title, [row for row in rows if "reason" not in row]))
        for row in rows:
            if "reason" in row:
                console.print(f"{row['contestant']} left out: {row['reason']}", markup=False)
    others = report.machine.get("others_cpu_share")
    if others is not None and others > QUIET:
        console.print(
            f"[bold]other programs used {others:.0%} of the processors meanwhile: do not quote these figures[/]"
        )
    for title, figures in (("largest difference of a score", report.parity), ("ratios", report.ratios)):
        console.print(f"{title}: " + ", ".join(f"{name} {_cell(value)}" for name, value in figures.items()))


def _title(row: Row, runs: int) -> str:
    """What a row's table is about: as it says itself, else the kind of loop, else the threads of a call."""
    if "table" in row:
        return str(row["table"])
    if "loop" in row:
        return f"{row['loop']} loop, medians of {runs} runs"
    users = f", users in a call: {row['users']}" if row.get("users", 1) > 1 else ""
    return f"threads: {row['threads']}{users}, all calls of {runs} runs"


def _table(title: str, rows: Sequence[Row]) -> Table:
    """A column for each contestant; where there are many, a line for each."""
    from rich.table import Table

    names = [name for name in dict.fromkeys(n for row in rows for n in row) if name not in NOT_FIGURES]
    if len(rows) <= MOST_COLUMNS:
        table = Table("", *(row["contestant"] for row in rows), title=title)
        for name in names:
            table.add_row(name, *(_cell(row.get(name)) for row in rows))
    else:
        table = Table("", *names, title=title)
        for row in rows:
            table.add_row(row["contestant"], *(_cell(row.get(name)) for name in names))
    return table


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e4 else f"{value:,.0f}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _rounded(value: Any) -> Any:
    """Six significant digits: more would only look precise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return value
