"""What a search found, for programs and for eyes: front.json and front.png.

In: finished trials, the pick if there is one. Out: `SearchReport`, each point with its place on the fronts of accuracy
against a speed, and a picture of them.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rankd.compress.compression_recipe import CompressionRecipe
from rankd.compress.measured_speed import Speed
from rankd.compress.pareto import front
from rankd.compress.speed_target import SPEEDS, Target
from rankd.compress.trials import Made, TrialRecord
from rankd.errors import MissingExtra
from rankd.gate_record import GatedMetric, GateRecord, Int8Record
from rankd.picture import new_picture

AXES = {
    "p50": "one request, cold: p50, ms",
    "warm_p50": "one request, state kept: p50, ms",
    "throughput": "candidates a second, cold",
}
CHOSEN, PASSED, REFUSED, ORIGINAL = "#d62728", "#1f6fb4", "#9aa5b1", "#111111"


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A trial: shares of the original's operations and parameters, the gate on the choosing days, speeds; `fronts` are
    the speeds (AXES) in which nothing else is both faster and more accurate. In int8 (`int8` says how) gate and speeds
    are those of the quantized graphs."""

    trial_id: str
    label: str
    recipe: CompressionRecipe
    flops: float
    parameters: float
    gate: GateRecord
    passed: bool
    speed: Speed
    original_speed: Speed
    fronts: tuple[str, ...]
    int8: Int8Record | None = None


class SearchReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """front.json. `original` is the median of what was measured of the original beside each trial. `chosen` is a
    trial_id, or "" if nothing was, and `why` says why; `final` is the gate on the days that were kept back."""

    accuracy: str
    target: str
    complete: bool
    points: tuple[Point, ...]
    failures: dict[str, str]
    original: Speed | None = None
    chosen: str = ""
    why: str = ""
    final: GateRecord | None = None


def report_of(
    trials: Sequence[TrialRecord], accuracy: str, target: Target, complete: bool, chosen: str = "", why: str = ""
) -> SearchReport:
    """The report of finished trials."""
    made = [(one, one.made) for one in trials if one.made is not None]
    original = _median([what.original_speed for _, what in made]) if made else None
    fronts = _fronts([what for _, what in made], original, accuracy) if original is not None else []
    return SearchReport(
        accuracy=accuracy,
        target=target.shown(),
        complete=complete,
        points=tuple(_point(one, what, target, on) for (one, what), on in zip(made, fronts, strict=True)),
        failures={one.label: one.failure for one in trials if one.made is None},
        original=original,
        chosen=chosen,
        why=why,
    )


def check_drawing() -> None:
    """Refuse a search whose picture could not be drawn.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("rankd compress --search", "bench")


def write_report(folder: Path, report: SearchReport, target: Target) -> None:
    """front.json, and front.png if there is a point to draw; each is replaced as a whole."""
    document = msgspec.json.format(msgspec.json.encode(report))
    _replace(folder / "front.json", lambda place: place.write_bytes(document))
    if report.points:
        _replace(folder / "front.png", lambda place: draw_front(place, report, target))


def draw_front(path: Path, report: SearchReport, target: Target) -> None:
    """Accuracy against cold and warm latency and throughput, a panel each."""
    figure, panels = new_picture(path, len(AXES))
    for axes, axis in zip(panels, AXES, strict=True):
        _panel(axes, axis, report, target)
    panels[0].set_ylabel(f"{report.accuracy} kept of the original (95%)")
    drawn = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(drawn.values()), list(drawn), loc="outside lower center", ncols=-(-len(drawn) // 2), frameon=False
    )
    chosen = next((one for one in report.points if one.trial_id == report.chosen), None)
    about = f"recipes: {len(report.points)}; target: {report.target}"
    figure.suptitle(f"{about}\nchosen: {chosen.label}" if chosen else f"{about}\nnothing was chosen", fontsize=11)
    figure.savefig(path, dpi=120)


def _panel(axes: Any, axis: str, report: SearchReport, target: Target) -> None:
    """One speed: refused and passed points, the front, the original, the bound, the target, the chosen point."""
    for passed, int8 in itertools.product((False, True), (False, True)):
        points = [one for one in report.points if (one.passed, one.int8 is not None) == (passed, int8)]
        x, y, bars = _places(points, axis, report.accuracy)
        colour, label = (PASSED, "passed on the choosing days") if passed else (REFUSED, "refused by the gate")
        face, label = colour if passed else "white", label + (", int8" if int8 else "")
        if points:
            axes.errorbar(x, y, bars, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.55, zorder=1)
            marker, size = ("s", 24) if int8 else ("o", 26)
            axes.scatter(
                x, y, s=size, marker=marker, facecolor=face, edgecolor=colour, linewidth=1.1, label=label, zorder=3
            )
    on_front = sorted((one for one in report.points if axis in one.fronts), key=lambda one: _figure(one.speed, axis))
    x, y, _ = _places(on_front, axis, report.accuracy)
    axes.plot(x, y, color=PASSED, linewidth=1.3, alpha=0.8, label="Pareto front", zorder=2)
    if report.original is not None:
        place = _figure(report.original, axis)
        axes.scatter([place], [1.0], marker="D", s=48, color=ORIGINAL, label="original", zorder=4)
    bound = next(iter(report.points)).gate.metrics[report.accuracy].bound
    bound = target.bounds.get(report.accuracy, bound)
    axes.axhline(bound, color="0.35", linewidth=0.9, linestyle="--", label=f"bound {bound:g} (for the bars' lower end)")
    for limit in target.limits:
        if limit.word == axis:
            axes.axvline(limit.value, color=CHOSEN, linewidth=0.9, linestyle=":", label="target")
    for one in report.points:
        if one.trial_id == report.chosen:
            x, y, _ = _places([one], axis, report.accuracy)
            axes.scatter(x, y, marker="*", s=260, facecolor=CHOSEN, edgecolor="white", label="chosen", zorder=5)
    axes.set(xlabel=AXES[axis])
    axes.xaxis.set_major_formatter("{x:,.10g}")
    axes.margins(0.06)
    axes.grid(alpha=0.25)


def _places(points: Sequence[Point], axis: str, accuracy: str) -> tuple[list[float], list[float], Any]:
    """x, y, and how far the interval goes below and above y."""
    metrics: list[GatedMetric] = [one.gate.metrics[accuracy] for one in points]
    bars = np.asarray([(one.kept - one.low, one.high - one.kept) for one in metrics]).reshape(-1, 2).T
    return [_figure(one.speed, axis) for one in points], [one.kept for one in metrics], np.maximum(bars, 0.0)


def _fronts(made: Sequence[Made], original: Speed, accuracy: str) -> list[tuple[str, ...]]:
    """For each model the speeds in which neither another model nor the original is both faster and more accurate."""
    on: list[list[str]] = [[] for _ in made]
    for axis in AXES:
        sign = -1.0 if axis == "throughput" else 1.0
        costs = [(-one.served_gate.metrics[accuracy].kept, sign * _figure(one.speed, axis)) for one in made]
        for number in front(np.asarray([*costs, (-1.0, sign * _figure(original, axis))])):
            if number < len(made):
                on[number].append(axis)
    return [tuple(axes) for axes in on]


def _point(trial: TrialRecord, made: Made, target: Target, fronts: tuple[str, ...]) -> Point:
    start, gate = made.start, target.judged(made.served_gate)
    return Point(
        trial_id=trial.trial_id,
        label=f"{trial.label}, {trial.recipe.finetune.epochs} epochs",
        recipe=trial.recipe,
        flops=start.flops,
        parameters=start.parameters,
        gate=gate,
        passed=all(target.judged(one).passed for one in made.gates),
        speed=made.speed,
        original_speed=made.original_speed,
        fronts=fronts,
        int8=made.int8,
    )


def _figure(speed: Speed, axis: str) -> float:
    figure: float = getattr(speed, SPEEDS[axis])
    return figure


def _median(speeds: Sequence[Speed]) -> Speed:
    return Speed(*np.median([msgspec.structs.astuple(one) for one in speeds], axis=0).tolist())


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    write(part)
    os.replace(part, path)
