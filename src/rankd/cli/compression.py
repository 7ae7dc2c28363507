"""`rankd compress`: a trained run and a recipe become a smaller run, if the accuracy gate lets it pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rankd.cli.offline import need_torch

if TYPE_CHECKING:
    from rankd.gate_record import Compression, GateRecord


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--recipe", required=True, type=click.Path(path_type=Path), help="Steps, fine-tuning, bounds: a .toml.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="The new run's folder; an interrupted run goes on."
)
@click.option("--data", type=click.Path(path_type=Path), help="Where the log is now, if it was moved.")
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    help="Requests to find the scales of int8 on, a JSON object a line; left out: the log's.",
)
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
def compress(run: Path, recipe: Path, out: Path, data: Path | None, calibrate: Path | None, as_json: bool) -> None:
    """Make a smaller version of a trained ranker, if it keeps its quality.

    RUN is a folder of `rankd train`. The smaller model is tuned to the original and compared with it on days that
    neither has seen; OUT appears whole, and only if every metric keeps what the recipe asks for.
    """
    need_torch("rankd compress")
    import msgspec

    from rankd.cli.progress import progress_bar
    from rankd.compress.compress_run import compress as make_smaller
    from rankd.compress.compression_recipe import CompressionRecipe
    from rankd.config import read_struct

    plan = read_struct(CompressionRecipe, recipe)
    with progress_bar("compressing") as advance:
        made = make_smaller(run, plan, out, data, advance, calibrate)
    if as_json:
        click.echo(json.dumps({"run": str(out), **msgspec.to_builtins(made)}))
    else:
        _print(made)
        click.echo(f"the smaller model is in {out}; next: rankd eval {out}, rankd build {out}")


def _print(made: Compression) -> None:
    import msgspec

    if made.recipe.get("steps"):
        _print_gate(made.gate, "")
        click.echo(f"FLOPs {made.flops:.3f} of the original's, parameters {made.parameters:.3f}")
    if made.ms:
        figures = ", ".join(f"{name} {ms:.3f} ms" for name, ms in made.ms.items())
        click.echo(f"{figures}; prices are off by at most {made.price_error:.0%} on the models they were fitted to")
    if not isinstance(made.int8, msgspec.UnsetType):
        int8 = made.int8
        _print_gate(int8.gate, "in int8: ")
        kept = f"; in float stay {', '.join(int8.kept)}" if int8.kept else ""
        click.echo(f"{int8.layers - len(int8.kept)} of {int8.layers} layers in int8{kept}")
        click.echo(f"a logit changes by {int8.error:.3f} of their spread ({int8.calibration})")
        click.echo(", ".join(f"{ms:.3f} ms in {name}" for name, ms in int8.ms.items()) + " on this machine")


def _print_gate(gate: GateRecord, what: str) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{what}{gate.num_requests} requests of {gate.num_users} users, {gate.since} to {gate.until}"
    table = Table("metric", "original", "compressed", "kept (95%)", "bound", title=title)
    for name, one in gate.metrics.items():
        kept = f"{one.kept:.4f} ({one.low:.4f} to {one.high:.4f})"
        table.add_row(name, f"{one.original:.4f}", f"{one.compressed:.4f}", kept, f"{one.bound:g}")
    Console(width=120).print(table)
