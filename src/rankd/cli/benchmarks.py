"""The benchmarks: `rankd bench SUITE --workload NAME`."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def bench() -> None:
    """Measure this machine, with the contestants in one run.

    Each suite checks that all contestants give the same scores, then measures them in turn. With --json the last line
    of standard output is one JSON object.
    """


@bench.command()
@click.option(
    "--workload",
    "name",
    default="small",
    show_default=True,
    help="base, long, mixed, skewed, small, or a .toml file of your own.",
)
@click.option("--seconds", type=click.FloatRange(0.1), default=3.0, show_default=True, help="Of each measurement.")
@click.option(
    "--rate", type=click.FloatRange(0.1), help="Requests a second of the open loop; half the capacity if left out."
)
@click.option(
    "--runs", type=click.IntRange(1), default=5, show_default=True, help="Rounds; the figures are their medians."
)
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="A model or version folder of your own.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
def serve(name: str, seconds: float, rate: float | None, runs: int, model: Path | None, as_json: bool) -> None:
    """Latency of the server over what the model itself takes.

    A real server and a load generator, in processes of their own: in process, JSON and binary tensors over HTTP; one
    connection (closed loop), then Poisson arrivals at --rate (open loop), latency from the scheduled time.
    """
    from rankd.bench.report import print_report
    from rankd.bench.serving import ServeOptions, run_serve
    from rankd.bench.workload import load_workload
    from rankd.cli.progress import progress_bar

    with progress_bar("serve") as advance:
        report = run_serve(load_workload(name), ServeOptions(seconds, runs, rate, model), advance)
    if as_json:
        click.echo(report.line())
    else:
        print_report(report)
