"""`rankd compress --search` and `--to`: a search, its picture, and what it chose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rankd.cli.progress import progress_bar
from rankd.errors import ConfigError, RankdError

if TYPE_CHECKING:
    from rankd.compress.search import Search
    from rankd.compress.search_report import SearchReport
    from rankd.compress.speed_target import Target

CHOSEN = "chosen"


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command was given: the run, where its log is, a plan's file, minutes, requests for int8."""

    run: Path
    data: Path | None
    plan: Path | None
    minutes: float
    calibrate: Path | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """The run that was made, the search's folder, and what the search found."""

    run: Path
    folder: Path
    report: SearchReport


def search_recipes(asked: Asked, folder: Path) -> Found:
    """`--search`: try recipes, then choose the fastest that passes, into `<folder>/chosen`.

    Raises: as `Search`, `pick` and `Search.settle`; front.json and front.png are written first.
    """
    from rankd.compress.speed_target import Target

    with _opened(asked, folder) as search:
        complete = _try_recipes(search, asked.minutes)
        return Found(folder / CHOSEN, folder, _choose(search, Target(), folder / CHOSEN, complete))


def compress_to(asked: Asked, target: str, out: Path, folder: Path | None) -> Found:
    """`--to`: choose what answers a target from a search, which is begun first if there is none.

    Raises: as `Search`, `read_target`, `pick` and `Search.settle`.
    """
    from rankd.compress.speed_target import read_target

    if out.exists():
        raise ConfigError(f"{out} exists; name another folder with --out, or remove it")
    folder = folder or asked.run.resolve().with_name(f"{asked.run.resolve().name}-search")
    with _opened(asked, folder) as search:
        wanted = read_target(target, search.plan.gate)
        minutes = asked.minutes if search.is_new() else 0.0  # what was tried, without trying more
        complete = _try_recipes(search, minutes)
        return Found(out, folder, _choose(search, wanted, out, complete))


def show_search(found: Found) -> None:
    """For people: the points of the fronts, and the choice."""
    from rich.console import Console
    from rich.table import Table

    report = found.report
    title = f"recipes: {len(report.points)}, and {len(report.failures)} that could not be done; on a front are:"
    table = Table("recipe", f"{report.accuracy} kept (95%)", "passed", "p50 ms", "warm", "candidates/s", title=title)
    if report.original is not None:
        one = report.original
        rates = (f"{one.cold_p50_ms:.3f}", f"{one.warm_p50_ms:.3f}", f"{one.cold_throughput:,.0f}")
        table.add_row("the original", "1", "", *rates)
    for point in sorted(report.points, key=lambda one: one.speed.cold_p50_ms):
        if point.fronts or point.trial_id == report.chosen:
            metric, speed = point.gate.metrics[report.accuracy], point.speed
            table.add_row(
                point.label,
                f"{metric.kept:.4f} ({metric.low:.4f} to {metric.high:.4f})",
                "chosen" if point.trial_id == report.chosen else "yes" if point.passed else "no",
                f"{speed.cold_p50_ms:.3f}",
                f"{speed.warm_p50_ms:.3f}",
                f"{speed.cold_throughput:,.0f}",
            )
    Console(width=140).print(table)
    click.echo(report.why)
    if report.final is not None:
        for name, kept in report.final.metrics.items():
            click.echo(
                f"{name} on {report.final.since} to {report.final.until}, which the search did not see: "
                f"{kept.compressed:.4f}, {kept.kept:.4f} of the original (95%: {kept.low:.4f} to {kept.high:.4f})"
            )
    click.echo(
        f"{found.folder / 'front.png'} shows all; the smaller model is in {found.run}; next: rankd build {found.run}"
    )


def _opened(asked: Asked, folder: Path) -> Search:
    from rankd.compress.search import Search
    from rankd.compress.search_plan import SearchPlan
    from rankd.compress.search_report import check_drawing
    from rankd.config import read_struct

    check_drawing()
    plan = None if asked.plan is None else read_struct(SearchPlan, asked.plan)
    return Search(asked.run, folder, plan, asked.data, asked.calibrate)


def _try_recipes(search: Search, minutes: float) -> bool:
    """Search under the time limit; an interruption says how it goes on."""
    try:
        with progress_bar("searching") as advance:
            return search.start(minutes, advance)
    except KeyboardInterrupt:
        done = len(search.trials.known)
        click.echo(
            f"interrupted; {done} finished recipes are kept in {search.folder}: the same command goes on", err=True
        )
        raise


def _choose(search: Search, target: Target, out: Path, complete: bool) -> SearchReport:
    """Pick, judge once, make the run; the report says what happened, also where that ends in an error."""
    import msgspec

    from rankd.compress.compress_run import served_gate
    from rankd.compress.search_report import report_of, write_report
    from rankd.compress.speed_target import pick

    report = report_of(search.trials.known, search.plan.accuracy, target, complete)
    try:
        chosen = pick(search.trials.known, target, search.plan.accuracy)
        report = msgspec.structs.replace(report, chosen=chosen.trial.trial_id, why=chosen.why)
        with progress_bar("judging") as advance:
            made = search.settle(chosen, target, out, advance)
        report = msgspec.structs.replace(report, final=served_gate(made))
    except RankdError as error:
        report = msgspec.structs.replace(report, chosen="", why=str(error))
        raise
    finally:
        write_report(search.folder, report, target)
    return report
