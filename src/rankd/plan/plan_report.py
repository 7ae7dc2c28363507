"""Plans for people: tables on the terminal, and a picture of the strategies side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rankd.picture import new_picture
from rankd.plan.byte_sizes import show_bytes
from rankd.plan.choice import Option
from rankd.plan.cluster_sizes import ClusterRow, best_rows
from rankd.plan.prediction import ServerFigures
from rankd.plan.table_plan import show_shards

WIDTH, WIDE = 120, 140
DPI = 120


def print_option(option: Option) -> None:
    """Bytes, look-ups, calls and busy share of every server of a plan, and what is predicted."""
    plan, told = option.plan, option.prediction
    table = Table(title=option.title)
    for title in ("server", "tables", "bytes", "look-ups a request", "calls a request", "busy"):
        table.add_column(title, justify="left" if title == "server" else "right")
    held = len(plan.replicated) + len(plan.hot_rows)
    table.add_row("main", str(held), *_cells(told.main))
    for number, (shard, figures) in enumerate(zip(plan.shards, told.shards, strict=True)):
        table.add_row(f"shard {number}", str(len(shard.parts)), *_cells(figures))
    console = Console(width=WIDTH)
    console.print(table)
    latency = "a server cannot keep up"
    if told.mean_ms is not None and told.p99_ms is not None:
        latency = f"mean {told.mean_ms:,.2f} ms, p99 {told.p99_ms:,.2f} ms"
    console.print(
        f"predicted at {told.rate:,.0f} requests a second: {latency}; {told.calls} calls and {told.cpu_ms:,.2f} ms of "
        f"CPU a request, {told.cores} cores",
        highlight=False,
    )


def print_options(options: Iterable[Option]) -> None:
    """All that was compared, a line each."""
    table = Table(title="compared")
    for title in ("plan", "parts", "most bytes", "calls", "CPU ms", "mean ms", "p99 ms", "cores"):
        table.add_column(title, justify="left" if title == "plan" else "right")
    for one in options:
        told = one.prediction
        table.add_row(
            one.title,
            str(sum(len(shard.parts) for shard in one.plan.shards)),
            show_bytes(max((one.plan.main_bytes, *one.plan.shard_bytes))),
            str(told.calls),
            f"{told.cpu_ms:,.2f}",
            _milliseconds(told.mean_ms),
            _milliseconds(told.p99_ms),
            str(told.cores),
        )
    Console(width=WIDTH).print(table)


def print_sizes(rows: Iterable[ClusterRow]) -> None:
    """Strategies by numbers of servers."""
    table = Table(title="simulated")
    columns = (
        "servers",
        "strategy",
        "main + shards",
        "requests/s",
        "tables in all",
        "CPU ms",
        "busiest",
        "p50 ms",
        "p99 ms",
        "server-hours",
    )
    for title in columns:
        table.add_column(title, justify="left" if title == "strategy" else "right")
    before = 0
    for row in rows:
        if before not in (0, row.servers):
            table.add_section()
        table.add_row(
            str(row.servers) if row.servers != before else "",
            row.strategy,
            f"{row.mains} + {row.servers - row.mains} of {row.shards}",
            f"{row.rate:,.0f}",
            show_bytes(row.size_bytes),
            f"{row.cpu_ms:,.2f}",
            f"{row.busy:.0%}",
            _milliseconds(row.p50_ms),
            _milliseconds(row.p99_ms),
            _milliseconds(row.server_hours),
        )
        before = row.servers
    Console(width=WIDE).print(table)


def print_best(rows: Iterable[ClusterRow], by_cost: bool) -> None:
    """The best strategy for each number of servers, a line each."""
    console = Console(width=WIDTH)
    console.print("server-hours are those of a million requests; best by " + ("them:" if by_cost else "p99:"))
    for row in best_rows(rows, by_cost):
        console.print(
            f"{row.servers} servers: {row.strategy} on {show_shards(row.shards)}, {row.rate:,.0f} requests a second, "
            f"p99 {row.p99_ms:,.2f} ms, {row.server_hours:,.2f} server-hours",
            highlight=False,
        )


def draw_options(options: Sequence[Option], path: Path, title: str) -> None:
    """Bytes, look-ups and calls of every shard, a bar for each plan, as a PNG, SVG or PDF.

    Raises:
        MissingExtra: matplotlib is not installed. ConfigError: the picture cannot be drawn there.
    """
    panels = {
        "GiB of tables": [[one.size_bytes / 1024**3 for one in _servers(option)] for option in options],
        "look-ups a request": [[one.lookups for one in _servers(option)] for option in options],
        "calls a request": [[one.calls for one in _servers(option)] for option in options],
    }
    figure, all_axes = new_picture(path, len(panels))
    bar = 0.8 / len(options)
    most = max(len(_servers(option)) for option in options)
    for axes, (label, values) in zip(all_axes, panels.items(), strict=True):
        for number, (option, heights) in enumerate(zip(options, values, strict=True)):
            places = [place + (number - (len(options) - 1) / 2) * bar for place in range(len(heights))]
            axes.bar(places, heights, bar, label=option.title)
        axes.set(ylabel=label, xticks=range(most), xticklabels=["main", *map(str, range(most - 1))], xlabel="shard")
        axes.grid(axis="y", alpha=0.3)
    all_axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=DPI)


def _servers(option: Option) -> tuple[ServerFigures, ...]:
    return option.prediction.main, *option.prediction.shards


def _cells(one: ServerFigures) -> tuple[str, str, str, str]:
    return show_bytes(one.size_bytes), f"{one.lookups:,.0f}", f"{one.calls:g}", f"{one.busy:.1%}"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"
