"""What fills a feature store and looks into it: `rankd features load`, `export`, `status`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rankd.errors import ConfigError

if TYPE_CHECKING:
    from rankd.features.rows.row_schema import RowSchema
    from rankd.features.rows.table_meta import TableMeta
    from rankd.features.stores.feature_store import FeatureStore

Command = TypeVar("Command", bound=Callable[..., Any])

VARIABLES = "RANKD_FEATURES__STORE__"
# Thousands of rows at once take longer than what a request waits for.
BULK_TIMEOUTS_MS = {"timeout_ms": 10_000.0, "write_timeout_ms": 20_000.0}
KEYS = {"items": "item_id", "users": "user_id"}
ONLY_ROWS = ("schema_path", "update", "grace")
ONLY_HISTORIES = ("event", "values", "keep")


def store_options(command: Command) -> Command:
    """--store and --password-file, of every command here."""
    url = click.option("--store", "url", required=True, help="lmdb:/folder, redis://host:port/db, rediss://...")
    password = click.option(
        "--password-file",
        type=click.Path(path_type=Path),
        help="Holds the store's password; else the variable RANKD_FEATURES__STORE__PASSWORD does.",
    )
    return url(password(command))


@click.group()
def features() -> None:
    """Fill and inspect a feature store.

    RANKD_FEATURES__STORE__<KEY> sets what a store's URL does not say: user, password, tls_ca, map_gib and so on.
    """


@features.command()
@click.argument("file", type=click.Path(path_type=Path))
@store_options
@click.option("--namespace", required=True, help="Whose table it is: the model's name.")
@click.option(
    "--table", type=click.Choice(["items", "users", "histories"]), help="That of the schema, or items, if left out."
)
@click.option("--schema", "schema_path", type=click.Path(path_type=Path), help="The columns, a .toml file.")
@click.option("--update", is_flag=True, help="Write over single rows instead of replacing the table.")
@click.option("--grace", type=click.FloatRange(0), help="Seconds that replaced rows stay for; 5 by default.")
@click.option("--event", help="Histories: what events are that have no name in the file.")
@click.option("--values", multiple=True, help="Histories: a numeric column to keep; may be given several times.")
@click.option("--keep", type=click.IntRange(1), help="Histories: the newest events of a user; 1000 by default.")
@click.option(
    "--patience", type=click.FloatRange(0), default=30.0, show_default=True, help="Seconds for a store in trouble."
)
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
def load(
    file: Path,
    url: str,
    password_file: Path | None,
    namespace: str,
    table: str | None,
    patience: float,
    as_json: bool,
    **given: Any,
) -> None:
    """Load a Parquet FILE into a table of a store.

    Rows replace the table in one step, when all are written; servers go on with those before until then. A load that
    was interrupted goes on where it was when the same command is run again. Without --schema the table keeps the one it
    has; the first time it is guessed from the columns and printed. Histories (user_id, item_id, time, event, numeric
    columns) are appended, what is there already is not added twice.
    """
    with closing(_open(url, password_file)) as store:
        if table == "histories":
            _refuse(given, ONLY_ROWS, "items and users")
            _load_histories(store, namespace, file, patience, as_json, given)
        else:
            _refuse(given, ONLY_HISTORIES, "histories")
            _load_rows(store, namespace, table, file, patience, as_json, given)


@features.command()
@store_options
@click.option("--namespace", help="One model's tables; of all if left out.")
@click.option("--histories", is_flag=True, help="Count histories; reads the names of all keys.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
def status(url: str, password_file: Path | None, namespace: str | None, histories: bool, as_json: bool) -> None:
    """What the tables of a store are: rows, schema versions, loadings under way."""
    from rankd.features.filling.history_loading import count_histories
    from rankd.features.filling.loading import list_tables, read_table
    from rankd.features.stores.store_config import redacted

    with closing(_open(url, password_file)) as store:
        places = list_tables(store) if namespace is None else [(namespace, table) for table in KEYS]
        found = [(one, table, read_table(store, one, table)) for one, table in places]
        tables = [_described(one, table, meta) for one, table, meta in found if meta.generation or meta.loading]
        spaces = sorted({one for one, _ in places})
        counts = {one: count_histories(store, one) for one in spaces} if histories else {}
    if as_json:
        click.echo(json.dumps({"store": redacted(url), "tables": tables, "histories": counts}))
    else:
        _print_status(redacted(url), tables, counts)


@features.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The .parquet file to write.")
@click.option("--table", type=click.Choice(["items", "users"]), default="items", show_default=True)
def export(model: Path, out: Path, table: str) -> None:
    """Write what a MODEL's artifact knows of its items to a Parquet file, and print its schema.

    It is what a store can be filled from at first, and the columns that a feature job of your own has to deliver.
    """
    from rankd.artifact import Artifact
    from rankd.features.catalogue import Catalogue
    from rankd.features.filling.exporting import item_frame, user_frame
    from rankd.features.rows.row_packing import schema_toml

    artifact = Artifact.open(model)
    catalogue = Catalogue.load(artifact.path / "tables", artifact.schema)
    declared, frame = (item_frame if table == "items" else user_frame)(catalogue, artifact.schema)
    try:
        frame.write_parquet(out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error}") from error
    click.echo(schema_toml(declared))


def _open(url: str, password_file: Path | None) -> FeatureStore:
    from rankd.config import convert
    from rankd.features.stores.open_store import open_store
    from rankd.features.stores.store_config import StoreConfig

    logging.getLogger("rankd").setLevel(logging.ERROR)  # a store's warnings come again as the error they end in
    document: dict[str, Any] = dict(BULK_TIMEOUTS_MS)
    for name, value in os.environ.items():
        if name.startswith(VARIABLES):
            document[name.removeprefix(VARIABLES).lower()] = value
    if password_file is not None:
        try:
            document["password"] = password_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--password-file {password_file}: cannot be read: {error}") from error
    if url == "memory:":
        raise ConfigError("--store memory: forgets everything when this command ends; name an lmdb: or redis: store")
    return open_store(convert({**document, "url": url}, StoreConfig, f"{VARIABLES}*", lax=True))


def _refuse(given: Mapping[str, Any], names: tuple[str, ...], tables: str) -> None:
    for name in names:
        if given[name]:
            raise ConfigError(f"--{name.removesuffix('_path')} goes with tables of {tables} only; leave it out")


def _load_rows(
    store: FeatureStore,
    namespace: str,
    table: str | None,
    file: Path,
    patience: float,
    as_json: bool,
    given: Mapping[str, Any],
) -> None:
    from rankd.cli.progress import progress_bar
    from rankd.features.filling.loading import LoadOptions, check_namespace, load_rows
    from rankd.features.filling.row_file import ParquetFile

    check_namespace(namespace)
    schema, guessed = _schema(store, namespace, table, file, patience, given["schema_path"])
    named = {schema.key, *(column.name for column in schema.columns)}
    over = [name for name in ParquetFile(file).schema if name not in named]
    if not as_json and guessed:
        click.echo(f"# guessed from {file}; keep it, correct it and give it with --schema next time\n{guessed}")
    if not as_json and over:
        click.echo(f"not in the schema, passed over: {', '.join(over)}")
    grace = {} if given["grace"] is None else {"grace_seconds": given["grace"]}
    options = LoadOptions(update=given["update"], patience_seconds=patience, **grace)
    with progress_bar("loading") as advance:
        report = load_rows(store, namespace, schema, file, options, advance)
    if as_json:
        click.echo(json.dumps({**asdict(report), "passed_over": over, "guessed_schema": guessed}))
    else:
        _print_table(f"{report.table} of {report.namespace}", asdict(report), skip=("namespace", "table"))


def _schema(
    store: FeatureStore, namespace: str, table: str | None, file: Path, patience: float, path: Path | None
) -> tuple[RowSchema, str]:
    """The schema of a load, and its TOML if it was guessed."""
    from rankd.features.filling.loading import read_table
    from rankd.features.filling.row_file import ParquetFile
    from rankd.features.rows.row_packing import guess_schema, schema_from_toml, schema_toml

    if path is not None:
        schema = schema_from_toml(path)
        if table not in (None, schema.table):
            raise ConfigError(f"{path}: is the schema of table '{schema.table}', and --table says '{table}'")
        return schema, ""
    table = table or "items"
    current = read_table(store, namespace, table, patience).schema
    if current is not None:
        return current, ""
    schema = guess_schema(ParquetFile(file).scan, table, KEYS[table])
    return schema, schema_toml(schema)


def _load_histories(
    store: FeatureStore, namespace: str, file: Path, patience: float, as_json: bool, given: Mapping[str, Any]
) -> None:
    from rankd.cli.progress import progress_bar
    from rankd.features.filling.history_loading import HistoryOptions, load_histories

    keep = {} if given["keep"] is None else {"keep": given["keep"]}
    options = HistoryOptions(given["event"] or "", given["values"] or None, patience_seconds=patience, **keep)
    with progress_bar("loading") as advance:
        report = load_histories(store, namespace, file, options, advance)
    if as_json:
        click.echo(json.dumps({"table": "histories", **asdict(report)}))
    else:
        _print_table(f"histories of {namespace}", asdict(report), skip=("namespace",))


def _described(namespace: str, table: str, meta: TableMeta) -> dict[str, Any]:
    import msgspec

    row_bytes = meta.schema.row_bytes if meta.schema else 0
    loading = meta.loading and {
        "generation": meta.loading.generation,
        "schema_version": meta.loading.schema.version,
        "rows_done": meta.loading.rows_done,
        "rows": meta.loading.rows,
    }
    return {
        "namespace": namespace,
        "table": table,
        "generation": meta.generation,
        "schema_version": meta.schema.version if meta.schema else 0,
        "rows": meta.rows,
        "row_bytes": row_bytes,
        "bytes": meta.rows * row_bytes,
        "loaded": meta.loaded,
        "loading": loading,
        "columns": msgspec.to_builtins(meta.schema.columns) if meta.schema else [],
    }


def _print_table(title: str, values: Mapping[str, Any], skip: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = {name: value for name, value in values.items() if name not in skip}
    table = Table(*(name.replace("_", " ") for name in shown), title=title)
    table.add_row(*(f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" for value in shown.values()))
    Console(width=140).print(table)


def _print_status(url: str, tables: list[dict[str, Any]], histories: Mapping[str, int]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not tables:
        click.echo(f"{url}: no table is loaded")
    else:
        table = Table("table", "schema", "rows", "bytes a row", "generation", "loaded", "under way", title=url)
        for one in tables:
            under_way = one["loading"]
            table.add_row(
                f"{one['table']} of {one['namespace']}",
                f"version {one['schema_version']}" if one["schema_version"] else "",
                f"{one['rows']:,}",
                f"{one['row_bytes']:,}",
                str(one["generation"]),
                one["loaded"],
                f"{under_way['rows_done']:,} of {under_way['rows']:,} rows" if under_way else "",
            )
        Console(width=140).print(table)
    for namespace, count in histories.items():
        click.echo(f"histories of {namespace}: {count:,}")
