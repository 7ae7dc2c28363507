"""`rankd compress`: a trained run and a recipe, or a search for one, become a smaller run, if the gate lets it pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rankd.cli.offline import need_torch
from rankd.errors import ConfigError

if TYPE_CHECKING:
    from rankd.gate_record import Compression, GateRecord


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--recipe", type=click.Path(path_type=Path), help="Steps, fine-tuning, bounds: a .toml.")
@click.option("--search", is_flag=True, help="Try many recipes; OUT keeps them, their picture, and what was chosen.")
@click.option("--to", "target", help="What to reach, like 'p99<=5ms, ndcg@10>=99%'; chosen from a search.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The new folder; what was begun goes on.")
@click.option("--data", type=click.Path(path_type=Path), help="Where the log is now, if it was moved.")
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    help="Requests to find the scales of int8 on, a JSON object a line; left out: the log's.",
)
@click.option(
    "--minutes", type=click.FloatRange(0, min_open=True), default=30.0, show_default=True, help="Of a search."
)
@click.option("--plan", type=click.Path(path_type=Path), help="What a search tries, and how: a .toml.")
@click.option(
    "--from", "source", type=click.Path(path_type=Path), help="With --to: the search's folder.  [default: RUN-search]"
)
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
def compress(
    run: Path,
    recipe: Path | None,
    search: bool,
    target: str | None,
    out: Path,
    data: Path | None,
    calibrate: Path | None,
    minutes: float,
    plan: Path | None,
    source: Path | None,
    as_json: bool,
) -> None:
    """Make a smaller version of a trained ranker, if it keeps its quality.

    RUN is a folder of `rankd train`. Give a recipe (--recipe), or let recipes be tried (--search), or say what is to be
    reached (--to). The smaller model is tuned to the original and compared with it on days that neither has seen; it
    appears whole, and only if every metric keeps what was asked for.
    """
    need_torch("rankd compress")
    given = [name for name, one in (("--recipe", recipe), ("--search", search), ("--to", target)) if one]
    if len(given) != 1:
        raise ConfigError(
            f"give one of --recipe FILE, --search and --to TARGET, not {' and '.join(given) or 'none of them'}"
        )
    if recipe is not None:
        _with_recipe(run, recipe, out, data, calibrate, as_json)
        return
    import msgspec

    from rankd.cli.compression_search import Asked, compress_to, search_recipes, show_search

    asked = Asked(run, data, plan, minutes, calibrate)
    found = search_recipes(asked, out) if target is None else compress_to(asked, target, out, source)
    if as_json:
        document = {"run": str(found.run), "search": str(found.folder), **msgspec.to_builtins(found.report)}
        click.echo(json.dumps(document))
    else:
        show_search(found)


def _with_recipe(run: Path, recipe: Path, out: Path, data: Path | None, calibrate: Path | None, as_json: bool) -> None:
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

    if made.recipe.get("steps") or made.recipe.get("quantize", {}).get("finetune"):
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
