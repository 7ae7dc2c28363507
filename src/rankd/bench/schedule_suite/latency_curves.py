"""A report of the schedule suite as a picture: p99 against the offered rate, of everybody and of short requests."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from rankd.bench.report import Report
from rankd.picture import new_picture

PANELS = {"all requests": "p99_ms", "short requests": "short_p99_ms"}


def draw_curves(report: Report, path: Path) -> None:
    """Write the picture.

    Raises:
        MissingExtra: matplotlib is not installed. ConfigError: not a kind of picture, or no folder for it.
    """
    curves = {title: _curves(report, key) for title, key in PANELS.items()}
    drawn = {title: found for title, found in curves.items() if found}  # a workload may have no short requests
    figure, axes = new_picture(path, len(drawn))
    bound_ms = float(report.workload["bound_ms"])
    for panel, (title, found) in zip(axes if len(drawn) > 1 else [axes], drawn.items(), strict=True):
        for name, points in found.items():
            rates, latencies = zip(*sorted(points), strict=True)
            panel.plot(rates, latencies, marker="o", markersize=3, linewidth=1.2, label=name)
        panel.axhline(bound_ms, color="grey", linewidth=0.8, linestyle="--")
        panel.set(title=title, xlabel="requests a second offered", ylabel="p99, ms", yscale="log")
        panel.set_ylim(top=20 * bound_ms)
        if panel.lines[1:]:
            panel.legend(fontsize=8)
    figure.suptitle(
        f"{report.workload['name']}: {report.workload['arrivals']} arrivals; dashed: the bound", fontsize=10
    )
    figure.savefig(path, dpi=150)


def _curves(report: Report, key: str) -> dict[str, list[tuple[Any, Any]]]:
    """(rate, latency) of every measurement, by contestant."""
    found: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
    for row in report.results:
        if key in row and "rate" in row and row["contestant"] != "load generator":
            found[row["contestant"]].append((row["rate"], row[key]))
    return found
