"""The benchmarks of embedding tables: `rankd bench tables`, `rankd bench shards`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option(
    "--storage",
    "storages",
    type=click.Choice(["fp32", "fp16", "int8", "int4"]),
    multiple=True,
    default=("fp32", "fp16", "int8", "int4"),
    show_default=True,
    help="Of the tables; may be given several times.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    multiple=True,
    default=(1, 2),
    show_default=True,
    help="Of one call; may be given several times.",
)
@click.option("--samples", type=click.IntRange(1), default=256, show_default=True, help="Of one call.")
@click.option("--smaller", type=click.IntRange(1), default=100, show_default=True, help="MLPerf's rows over the rows.")
@click.option("--dim", type=click.IntRange(1), default=128, show_default=True, help="Numbers of a row.")
@click.option("--runs", type=click.IntRange(1), default=7, show_default=True, help="Rounds of a few calls each.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
def tables(
    storages: tuple[str, ...],
    threads: tuple[int, ...],
    samples: int,
    smaller: int,
    dim: int,
    runs: int,
    as_json: bool,
) -> None:
    """Pooled look-up in embedding tables, beside torch and FBGEMM.

    MLPerf's 26 DLRM tables with a fraction of their rows, ids drawn uniformly. torch's EmbeddingBag and its quantized
    kin, and FBGEMM's batched tables if fbgemm_gpu is installed; their rows lie on huge pages, ours in mapped files.
    """
    from rankd.bench.table_suite.table_lookups import TableOptions, run_tables
    from rankd.cli.progress import progress_bar
    from rankd.cli.reporting import show_report
    from rankd.embeddings.table_spec import TableStorage

    kinds = tuple(TableStorage(one) for one in dict.fromkeys(storages))
    options = TableOptions(kinds, tuple(dict.fromkeys(threads)), samples, smaller, dim, runs)
    with progress_bar("tables") as advance:
        report = run_tables(options, advance)
    show_report(report, as_json)


@click.command()
@click.option("--workload", "name", default="dlrm", show_default=True, help="dlrm, or a .toml file of your own.")
@click.option(
    "--shards",
    type=click.IntRange(1),
    multiple=True,
    default=(1, 2, 4),
    show_default=True,
    help="Numbers of shards; may be given several times.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.1),
    help="Of each measurement; as long as a p99 of ten requests takes if left out.",
)
@click.option(
    "--runs", type=click.IntRange(1), default=5, show_default=True, help="Rounds; the figures are their medians."
)
@click.option("--costs", type=click.Path(path_type=Path), help="Where measured costs are written, for `rankd plan`.")
@click.option("--picture", type=click.Path(path_type=Path), help="Where the time goes: a .png or .svg.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
def shards(
    name: str,
    shards: tuple[int, ...],
    seconds: float | None,
    runs: int,
    costs: Path | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """What dividing embedding tables over processes costs, for each strategy of `rankd plan`.

    A server and its shards in processes of their own on this machine, all layouts in turn, at half of what one process
    answers at most: latency, processor time, where the time of a request goes, and what the simulator of `rankd plan`
    says of the same requests.
    """
    import msgspec

    from rankd.bench.shard_suite.attribution_picture import draw_attribution
    from rankd.bench.shard_suite.dlrm_workload import load_dlrm
    from rankd.bench.shard_suite.sharding import ShardOptions, run_shards
    from rankd.cli.progress import progress_bar
    from rankd.cli.reporting import show_report
    from rankd.picture import check_picture
    from rankd.plan.cost_model import CostModel
    from rankd.plan.costs_file import check_costs_path, write_costs

    workload = load_dlrm(name)
    if costs is not None:
        check_costs_path(costs)
    if picture is not None:
        check_picture(picture)
    with progress_bar("shards") as advance:
        options = ShardOptions(tuple(dict.fromkeys(shards)), seconds, runs)
        report = run_shards(workload, options, advance, lambda line: click.echo(line, err=True))
    if picture is not None:
        draw_attribution(report, picture)
    if costs is not None:
        write_costs(costs, msgspec.convert(report.workload["costs"], CostModel), ["Measured by rankd bench shards."])
    show_report(report, as_json)
