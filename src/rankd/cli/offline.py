"""The offline commands: `rankd train`, `rankd eval`, `rankd build`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rankd.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from rankd.train.evaluation import EvaluationReport


def need_torch(command: str) -> None:
    """Refuse a command whose packages are not installed.

    Raises:
        MissingExtra: torch or scipy is not there.
    """
    import importlib.util

    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("scipy") is None:
        raise MissingExtra(command, "train")


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True, help="The interaction log, .parquet or .csv.")
@click.option(
    "--describe", required=True, help="What its columns mean: a .toml file, or a packaged name (online-retail)."
)
@click.option("--recipe", required=True, help="Model and training: a .toml file, or a packaged name (online-retail).")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="The run's folder; an interrupted run goes on."
)
@click.option("--epochs", type=click.IntRange(1), help="At most so many epochs, over the recipe's.")
@click.option("--seed", type=click.IntRange(0), help="Over the recipe's.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
def train(
    data: Path, describe: str, recipe: str, out: Path, epochs: int | None, seed: int | None, as_json: bool
) -> None:
    """Train a ranker on an interaction log.

    The log is split by time as its description says; the best epoch on the validation time is kept.
    """
    need_torch("rankd train")
    import msgspec

    from rankd.cli.progress import progress_bar
    from rankd.train.description import LogDescription
    from rankd.train.recipe import Recipe
    from rankd.train.run import begin_run, packaged_or_file
    from rankd.train.samples import prepare
    from rankd.train.trainer import Trainer

    plan = packaged_or_file(Recipe, "recipes", recipe)
    changes = {name: value for name, value in (("epochs", epochs), ("seed", seed)) if value is not None}
    plan = msgspec.structs.replace(plan, training=msgspec.structs.replace(plan.training, **changes))
    run, log = begin_run(out, data, packaged_or_file(LogDescription, "logs", describe), plan)
    _print_counts("rows", run.rows, as_json)
    trainer = Trainer(prepare(log, plan.shapes), plan, out)
    _print_counts("training baskets", {"used": len(trainer.samples), **trainer.counts}, as_json)
    with progress_bar("training") as advance:
        history = trainer.start(advance)
    for number, epoch in enumerate(history, start=1):
        if not as_json:
            click.echo(f"epoch {number}: " + ", ".join(f"{name} {value:.4g}" for name, value in epoch.items()))
    if as_json:
        click.echo(json.dumps({"run": str(out), "rows": run.rows, "baskets": trainer.counts, "epochs": history}))
    else:
        click.echo(f"the best weights are in {out}; next: rankd eval {out}, rankd build {out}")


@click.command(name="eval")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="Where the log is now, if it was moved.")
@click.option("--artifact", type=click.Path(path_type=Path), help="Score with this built artifact instead of torch.")
@click.option("--target", default="auto", help="Of the artifact's engine: openvino, native, cuda, ...")
@click.option(
    "--precision", type=click.Choice(["auto", "fp32", "bf16", "int8"]), default="auto", help="Of the artifact's engine."
)
@click.option("--sampled", type=click.IntRange(1), default=100, help="Other items beside the true ones of a basket.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the sampling and of the intervals.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
def evaluate(
    run: Path,
    data: Path | None,
    artifact: Path | None,
    target: str,
    precision: str,
    sampled: int,
    seed: int,
    as_json: bool,
) -> None:
    """Evaluate a trained ranker against baselines on held-out time.

    Each basket of the test time is one event: its true items against SAMPLED others, drawn uniformly from the items
    known when the test began. Intervals are 95%, from resampling users.
    """
    if artifact is None and (target, precision) != ("auto", "auto"):
        raise ConfigError("--target and --precision are of the engine that runs an --artifact; torch has neither")
    need_torch("rankd eval")
    from rankd.cli.progress import progress_bar
    from rankd.engine.backend import EngineConfig, Precision
    from rankd.train.run import evaluate_run

    engine = EngineConfig(target, Precision(precision), executors=1)
    with progress_bar("evaluating") as advance:
        report, document = evaluate_run(run, data, artifact, engine, sampled, seed, advance)
    if as_json:
        click.echo(json.dumps(document))
    else:
        _print_report(report)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("models"), help="The model repository.")
@click.option("--name", help="The model's name; the log's name if left out.")
@click.option("--version", help="The version; one more than the newest if left out.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="openvino, native, cuda, onnxruntime, reference; several times for several. "
    "Left out: openvino; in bf16 native too.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "int8"]),
    help="Served so by default. Left out: int8 for a run that was quantized, else fp32.",
)
@click.option(
    "--tables",
    type=click.Choice(["fp32", "fp16", "int8", "int4"]),
    help="Embedding tables beside the graph, kept so; left out: in the graph.",
)
@click.option("--data", type=click.Path(path_type=Path), help="Where the log is now, if it was moved.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
def build(
    run: Path,
    out: Path,
    name: str | None,
    version: str | None,
    targets: tuple[str, ...],
    precision: str | None,
    tables: str | None,
    data: Path | None,
    as_json: bool,
) -> None:
    """Build a servable artifact from a trained ranker.

    The graphs are run beside the torch model on real requests first; the version appears whole or not at all.
    """
    need_torch("rankd build")
    from rankd.artifact import Artifact
    from rankd.build.pack import BuildOptions, build_artifact, next_version
    from rankd.compress.compress_run import read_compression, read_int8
    from rankd.embeddings.table_spec import TableStorage
    from rankd.engine.backend import Precision
    from rankd.train.run import open_run, read_metrics, weights_sha256

    about, dataset, model = open_run(run, data)
    name = name or about.description.name
    storage = None if tables is None else TableStorage(tables)
    compression = read_compression(run)
    int8 = read_int8(run, compression)
    served = Precision(precision) if precision else Precision.FP32 if int8 is None else Precision.INT8
    options = BuildOptions(name, version or next_version(out / name), served, targets, tables=storage, int8=int8)
    metrics, trained = read_metrics(run), weights_sha256(run)
    place = build_artifact(out, model, dataset, about.recipe, options, metrics, compression, trained)
    parities = {target: record.parity for target, record in Artifact.open(place).manifest.engines.items()}
    if as_json:
        click.echo(json.dumps({"artifact": str(place), "precision": served.value, "parity": parities}))
    else:
        parity = ", ".join(
            f"{worst:.2g} on {target} in {which}" for target, one in parities.items() for which, worst in one.items()
        )
        click.echo(f"{place} is ready (largest difference of a logit to torch: {parity}); next: rankd serve {out}")


def _print_counts(title: str, counts: dict[str, int], as_json: bool) -> None:
    if not as_json:
        click.echo(f"{title}: " + "; ".join(f"{name} {count:,}" for name, count in counts.items()))


def _print_report(report: EvaluationReport) -> None:
    from rich.console import Console
    from rich.table import Table

    metrics = list(next(iter(report.table.values())))
    table = Table("contestant", *metrics, title=f"{report.num_events} test events of {report.num_users} users")
    for contestant, values in report.table.items():
        cells: list[Any] = [
            f"{values[m].value:.4f} ±{values[m].half_width:.4f}" if m in values else "" for m in metrics
        ]
        table.add_row(contestant, *cells)
    Console(width=140).print(table)
    for verdict in report.verdicts:
        click.echo(
            f"{verdict.metric}: {'beats' if verdict.beaten else 'does NOT beat'} '{verdict.best_baseline}' by "
            f"{verdict.margin.value:+.4f} (95% of the paired difference: {verdict.margin.low:+.4f} to "
            f"{verdict.margin.high:+.4f}; half-width of the ranker's own interval: {verdict.ranker_half_width:.4f})"
        )
