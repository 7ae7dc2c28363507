"""What calls, bytes and rows take on this machine: `rankd plan costs`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Where costs are written: a .toml or .json file."
)
@click.option(
    "--model", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A version, served for it."
)
@click.option("--stats", type=click.Path(path_type=Path), help="What `rankd plan stats` counted for its tables.")
@click.option("--seconds", type=click.FloatRange(0.05), default=1.0, show_default=True, help="Of each measurement.")
@click.option("--table-size", default="256MiB", show_default=True, help="Of the tables that look-ups are measured in.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
def costs(out: Path, model: Path | None, stats: Path | None, seconds: float, table_size: str, as_json: bool) -> None:
    """Measure what plans reckon with, on this machine.

    Rows looked up in each storage, calls of a shard on both of their sides; with --model also what else a request of
    that version takes, and sums are sent back in the format that it is served with. The result is what --costs of the
    other commands reads.
    """
    import msgspec

    from rankd.bench.shard_suite.measured_costs import CostOptions, model_costs, sums_of, table_costs
    from rankd.cli.progress import progress_bar
    from rankd.plan.byte_sizes import read_bytes
    from rankd.plan.costs_file import check_costs_path, write_costs
    from rankd.plan.declaration import read_loads
    from rankd.shards.shard_config import SumFormat

    check_costs_path(out)
    loads = () if model is None else read_loads(model, stats)
    sums = SumFormat.FP32 if model is None else sums_of(model)
    with progress_bar("costs") as advance:
        measured, notes = table_costs(CostOptions(seconds, read_bytes(table_size), sums), advance)
        if model is None:
            notes = [*notes, "dense_us, dense_sample_us and piece_samples are no measurements: give --model."]
        else:
            advance(2, 3, "model")
            measured = model_costs(measured, model, loads, seconds)
            name = model.resolve().parent.name
            notes = [*notes, f"The dense part is that of {name}, and samples are its candidate buckets."]
        advance(3, 3, "done")
    write_costs(out, measured, notes)
    if as_json:
        click.echo(msgspec.json.encode(measured))
    else:
        click.echo(out.read_text(), nl=False)
