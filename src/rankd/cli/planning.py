"""Where embedding tables go: `rankd plan TABLES`, `rankd plan stats`, `rankd plan simulate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rankd.cli.cost_measuring import costs
from rankd.errors import ConfigError

if TYPE_CHECKING:
    from rankd.plan.choice import Choice
    from rankd.plan.cost_model import CostModel
    from rankd.plan.declaration import Declaration
    from rankd.plan.table_plan import MemoryLimits, Strategy
    from rankd.plan.table_statistics import TableLoad

Command = TypeVar("Command", bound=Callable[..., Any])

AUTO = "auto"
STRATEGIES = ("singular", "one-shard", "capacity-balanced", "load-balanced", "net-aware")
SERVERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MOST_SHARDS = 256


class PlanGroup(click.Group):
    """`rankd plan TABLES` is `rankd plan layout TABLES`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `layout` before what is no command and no call for help."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["layout", *args]
        return super().parse_args(ctx, args)


def planning_options(command: Command) -> Command:
    """What a plan is made from."""
    options = (
        click.argument("tables"),
        click.option("--stats", type=click.Path(path_type=Path), help="What `rankd plan stats` counted."),
        click.option("--memory", help="That tables may take in each server, for example 64GiB."),
        click.option("--main-memory", help="The same for main servers, if it is not --memory."),
        click.option(
            "--replicate", default="1MiB", show_default=True, help="Tables up to this size are in every main server."
        ),
        click.option("--hot-rows", default="0", help="Size of a main server's cache of hot rows."),
        click.option("--costs", "costs_path", type=click.Path(path_type=Path), help="What `rankd plan costs` wrote."),
        click.option("--rate", type=click.FloatRange(0, min_open=True), help="Requests a second."),
        click.option(
            "--machine-cores", type=click.IntRange(1), help="All servers are processes of one machine, and share these."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group(cls=PlanGroup)
def plan() -> None:
    """Plan where embedding tables live on shards, and predict what that costs.

    `rankd plan TABLES` is `rankd plan layout TABLES`. TABLES is a TOML or JSON file, or a packaged model: dlrm-v2, or
    with its rows by a factor, dlrm-v2/20 or dlrm-v2x10.
    """


@plan.command()
@planning_options
@click.option("--shards", default="1..8", show_default=True, help="A number, or from..to: the best of them.")
@click.option("--strategy", type=click.Choice([AUTO, *STRATEGIES]), default=AUTO, show_default=True)
@click.option(
    "--p99-ms", type=click.FloatRange(0, min_open=True), help="Take the fewest cores that keep it, not the lowest p99."
)
@click.option("--out", type=click.Path(path_type=Path), help="Where the plan is written, as JSON.")
@click.option("--picture", type=click.Path(path_type=Path), help="Strategies side by side: a .png, .svg or .pdf.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
def layout(
    shards: str,
    strategy: str,
    p99_ms: float | None,
    out: Path | None,
    picture: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Place the tables of a model on shards.

    Every strategy is predicted with every number of shards; the best is printed with its reason. A layout that does not
    fit --memory is refused with what would help.
    """
    from rankd.picture import check_picture
    from rankd.plan.choice import choose
    from rankd.plan.plan_file import write_plan
    from rankd.plan.plan_report import print_option, print_options

    numbers = shard_numbers(shards)
    if picture is not None:
        check_picture(picture)
    task = _read_task(**given)
    choice = choose(task.loads, _strategies(strategy), numbers, task.limits, task.costs, p99_ms)
    if out is not None:
        write_plan(out, task.declaration, choice.best.plan, choice.best.prediction)
    if picture is not None:
        _draw(choice, picture, task.declaration.name)
    if as_json:
        click.echo(_line(choice, task.declaration.name))
        return
    print_option(choice.best)
    if len(choice.options) > 1:
        print_options(choice.options)
    for refused in choice.refused:
        click.echo(f"refused: {refused}")
    click.echo(choice.reason)


@plan.command()
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--tables", help="Their declaration, as in `rankd plan`; without it, all columns are tables.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where statistics are written, as JSON.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
def stats(path: Path, tables: str | None, out: Path, as_json: bool) -> None:
    """Count how tables are asked in a sample of requests.

    FILE is Parquet or CSV: a column is a table, a row a sample, a cell an id or a list of ids (in CSV, with spaces
    between). Without --tables, a table is taken to end with its largest id.
    """
    import msgspec

    from rankd.plan.declaration import read_declaration
    from rankd.plan.plan_file import write_json
    from rankd.plan.sampling import count_file

    rows = None if tables is None else {table.name: table.rows for table in read_declaration(tables).tables}
    counted = count_file(path, rows)
    write_json(out, counted)
    if as_json:
        click.echo(msgspec.json.encode(counted))
    else:
        click.echo(f"{out}: {len(counted.tables)} tables in {counted.samples:,} samples")


@plan.command()
@planning_options
@click.option("--shards", type=click.IntRange(1, MOST_SHARDS), help="The fewest that fit if left out.")
@click.option(
    "--servers",
    type=click.IntRange(1),
    multiple=True,
    default=SERVERS,
    show_default=True,
    help="In all; may be given several times.",
)
@click.option(
    "--stragglers",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="This share of calls takes ten times as long.",
)
@click.option(
    "--p99-ms", type=click.FloatRange(0, min_open=True), help="Find the highest rate that keeps it, in place of --rate."
)
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
def simulate(
    shards: int | None,
    servers: tuple[int, ...],
    stragglers: float,
    p99_ms: float | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Simulate every strategy on many servers.

    Servers beyond one for each shard and a main one go to whichever kind is the busiest. --rate is for each server:
    requests grow with the cluster. With --p99-ms the best is what a million requests cost the fewest server-hours,
    else the lowest p99.
    """
    import msgspec

    from rankd.cli.progress import progress_bar
    from rankd.plan.cluster_simulation import Stragglers
    from rankd.plan.cluster_sizes import SizeOptions, best_rows, simulate_sizes, smallest_plans
    from rankd.plan.plan_report import print_best, print_sizes

    task = _read_task(**given)
    plans, refused = smallest_plans(task.loads, _strategies(AUTO), task.limits, shards)
    options = SizeOptions(tuple(sorted(set(servers))), task.costs.rate, Stragglers(stragglers), p99_ms)
    with progress_bar("simulate") as advance:
        rows = simulate_sizes(plans, task.loads, task.costs, options, advance)
    if as_json:
        best = best_rows(rows, p99_ms is not None)
        click.echo(
            msgspec.json.encode({"model": task.declaration.name, "results": rows, "best": best, "refused": refused})
        )
        return
    print_sizes(rows)
    print_best(rows, p99_ms is not None)
    for one in refused:
        click.echo(f"refused: {one}")


plan.add_command(costs)


@dataclass(frozen=True, slots=True)
class PlanTask:
    """What there is to place, where, and at which costs."""

    declaration: Declaration
    loads: tuple[TableLoad, ...]
    limits: MemoryLimits
    costs: CostModel


def shard_numbers(text: str) -> range:
    """ "4" is 4 alone, "1..8" is 1 to 8.

    Raises:
        ConfigError: anything else, or numbers that no cluster has.
    """
    first, dots, last = text.partition("..")
    try:
        numbers = range(int(first), int(last if dots else first) + 1)
    except ValueError:
        numbers = range(0)
    if not numbers or numbers[0] < 1 or numbers[-1] > MOST_SHARDS:
        raise ConfigError(f"--shards {text}: give a number from 1 to {MOST_SHARDS}, or two with .. between: 1..8")
    return numbers


def _read_task(
    tables: str,
    stats: Path | None,
    memory: str | None,
    main_memory: str | None,
    replicate: str,
    hot_rows: str,
    costs_path: Path | None,
    rate: float | None,
    machine_cores: int | None,
) -> PlanTask:
    """The values of `planning_options`, read."""
    import msgspec

    from rankd.config import read_struct
    from rankd.plan.byte_sizes import read_bytes
    from rankd.plan.cost_model import CostModel
    from rankd.plan.costs_file import read_costs
    from rankd.plan.declaration import StatisticsFile, check_statistics, loads_of, read_declaration
    from rankd.plan.table_plan import MemoryLimits

    declaration = read_declaration(tables)
    counted = () if stats is None else read_struct(StatisticsFile, stats).tables
    check_statistics(counted, [table.name for table in declaration.tables], str(stats))
    shard_bytes = None if memory is None else read_bytes(memory)
    main_bytes = shard_bytes if main_memory is None else read_bytes(main_memory)
    limits = MemoryLimits(shard_bytes, main_bytes, read_bytes(replicate), read_bytes(hot_rows))
    costs = CostModel() if costs_path is None else read_costs(costs_path)
    if rate is not None:
        costs = msgspec.structs.replace(costs, rate=rate)
    if machine_cores is not None:
        costs = msgspec.structs.replace(costs, machine_cores=machine_cores)
    return PlanTask(declaration, loads_of(declaration, counted), limits, costs)


def _strategies(name: str) -> Sequence[Strategy]:
    from rankd.plan.table_plan import Strategy

    return tuple(Strategy) if name == AUTO else (Strategy(name),)


def _draw(choice: Choice, path: Path, title: str) -> None:
    """The options with as many shards as the best has, or with the most, and those that have no number."""
    from rankd.plan.choice import ALONE
    from rankd.plan.plan_report import draw_options

    numbers = {len(one.plan.shards) for one in choice.options if one.plan.strategy not in ALONE}
    best = len(choice.best.plan.shards)
    number = best if best in numbers else max(numbers, default=best)
    shown = [one for one in choice.options if one.plan.strategy in ALONE or len(one.plan.shards) == number]
    draw_options(shown, path, title)


def _line(choice: Choice, model: str) -> bytes:
    import msgspec

    results = [
        {"strategy": one.plan.strategy, "shards": len(one.plan.shards), "prediction": one.prediction}
        for one in choice.options
    ]
    return msgspec.json.encode(
        {
            "model": model,
            "strategy": choice.best.plan.strategy,
            "shards": len(choice.best.plan.shards),
            "reason": choice.reason,
            "prediction": choice.best.prediction,
            "results": results,
            "refused": choice.refused,
        }
    )
