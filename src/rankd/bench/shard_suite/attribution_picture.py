"""A report of the suite `shards` as a picture: where the time of a request goes, a bar for each layout; and its p99."""

from __future__ import annotations

from pathlib import Path

from rankd.bench.report import Report
from rankd.bench.shard_suite.open_loop import PARTS
from rankd.picture import new_picture


def draw_attribution(report: Report, path: Path) -> None:
    """Write the picture.

    Raises:
        MissingExtra: matplotlib is not installed. ConfigError: not a kind of picture, or no folder for it.
    """
    figure, (parts, tails) = new_picture(path, 2)
    rows = [row for row in report.results if PARTS[0] in row]
    places = list(range(len(rows)))
    left = [0.0] * len(rows)
    for part in PARTS:
        widths = [float(row[part]) for row in rows]
        parts.barh(places, widths, left=left, label=part.removesuffix("_ms").replace("_", " "))
        left = [begun + width for begun, width in zip(left, widths, strict=True)]
    parts.set(title="mean of a request", xlabel="ms")
    parts.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=5)
    tails.barh(places, [float(row["p99_ms"]) for row in rows], color="grey")
    tails.barh(places, [float(row["p50_ms"]) for row in rows], color="black", height=0.3)
    tails.plot([float(row["predicted_p99_ms"]) for row in rows], places, "r|", markersize=12, label="p99, simulated")
    tails.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    tails.set(title="p99 (grey) and p50 (black)", xlabel="ms")
    for panel in (parts, tails):
        panel.set_yticks(places, [str(row["contestant"]).partition(" (")[0] for row in rows], fontsize=7)
        panel.invert_yaxis()
    figure.savefig(path, dpi=150)
