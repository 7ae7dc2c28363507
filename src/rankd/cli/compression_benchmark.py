"""`rankd bench compress`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("compressed", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="Where the log is now, if it was moved.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Rounds of single requests.")
@click.option(
    "--requests", type=click.IntRange(2, 400), default=48, show_default=True, help="Single requests of a round."
)
@click.option("--candidates", type=click.IntRange(1), default=128, show_default=True, help="Of each request.")
@click.option(
    "--seconds", type=click.FloatRange(0.1), default=5.0, show_default=True, help="Of each rate that is tried."
)
@click.option("--bound-ms", type=click.FloatRange(1), default=100.0, show_default=True, help="The p99 to keep.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
def compress(
    run: Path,
    compressed: Path,
    data: Path | None,
    runs: int,
    requests: int,
    candidates: int,
    seconds: float,
    bound_ms: float,
    as_json: bool,
) -> None:
    """What compression is worth beside the model in torch, cause by cause.

    RUN is of `rankd train`, COMPRESSED what `rankd compress` made of it. Real servers around the same weights, each
    with one cause more: torch eager, its dense graph on OpenVINO, rankd's graphs, the compressed model, int8, users'
    states kept. Latency of single requests, highest rates under a p99, what is kept of the accuracy; the full model
    under too much load with the compressed one as its variant; and that the gate refuses what it has to refuse.
    """
    from rankd.bench.compress_suite.compressing import CompressOptions, run_compress
    from rankd.cli.offline import need_torch
    from rankd.cli.progress import progress_bar
    from rankd.cli.reporting import show_report

    need_torch("rankd bench compress")
    options = CompressOptions(runs, requests, candidates, seconds, bound_ms)
    with progress_bar("compress") as advance:
        report = run_compress(run, compressed, data, options, advance)
    show_report(report, as_json)
