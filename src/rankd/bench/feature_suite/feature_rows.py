"""What the store of the suite `features` holds: a row of 256 bytes for each item, one for each user, and all histories.

In: the catalogue of a built model. Out: Parquet files as a feature pipeline would hand them over, loaded with the code
behind `rankd features load`. The rows say what the artifact's own tables say, and an embedding on top that fills them
up, so that scores are the same wherever a row comes from. The histories are in the store alone.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from rankd.errors import ConfigError
from rankd.features.catalogue import Catalogue
from rankd.features.filling.history_loading import HistoryOptions, load_histories
from rankd.features.filling.loading import LoadOptions, load_rows
from rankd.features.rows.row_packing import pack_rows
from rankd.features.rows.row_schema import WORD_BYTES, ColumnKind, RowColumn, RowSchema
from rankd.features.schema import FIRST_ITEM_ROW, Categorical, FeatureSchema
from rankd.features.stores.open_store import open_store
from rankd.features.stores.store_config import StoreConfig
from rankd.types import Array, Int32Array

ROW_BYTES = 256
BULK_TIMEOUT_MS = 60_000.0
ITEM_KEY, USER_KEY = "item_id", "user_id"


@dataclass(frozen=True, slots=True)
class StoreFiles:
    """Parquet files and the schemas of the tables that they fill. `no_histories` has the columns of `histories` and no
    rows: a server that is given it knows no history but the store's."""

    item_schema: RowSchema
    user_schema: RowSchema
    items: Path
    users: Path
    histories: Path
    no_histories: Path
    keep_events: int


def write_store_files(catalogue: Catalogue, schema: FeatureSchema, folder: Path, seed: int) -> StoreFiles:
    """Write the files of a model that came from `synthetic_model`, whose numeric features are as in the log.

    Raises:
        ConfigError: the item features alone take more than a row.
    """
    folder.mkdir(parents=True)
    files = StoreFiles(
        item_schema=item_row_schema(schema),
        user_schema=RowSchema("users", USER_KEY, tuple(map(_categorical, schema.user_categorical))),
        items=folder / "items.parquet",
        users=folder / "users.parquet",
        histories=folder / "histories.parquet",
        no_histories=folder / "no_histories.parquet",
        keep_events=schema.stored_history,
    )
    item_frame(catalogue, schema, seed).write_parquet(files.items, compression="uncompressed")
    users = {USER_KEY: list(catalogue.ids.users)}
    codes = _texts(catalogue, "user", schema.user_categorical, catalogue.users.categories)
    pl.DataFrame(users | codes).write_parquet(files.users)
    histories = _history_frame(catalogue, schema)
    histories.write_parquet(files.histories)
    histories.clear().write_parquet(files.no_histories)
    return files


def fill_store(url: str, namespace: str, files: StoreFiles) -> None:
    """Load all files into an empty store.

    Raises:
        StoreFailure: it does not take them.
    """
    options = LoadOptions(grace_seconds=0.0)
    config = StoreConfig(url=url, timeout_ms=BULK_TIMEOUT_MS, write_timeout_ms=BULK_TIMEOUT_MS)
    with closing(open_store(config)) as store:
        load_rows(store, namespace, files.item_schema, files.items, options)
        load_rows(store, namespace, files.user_schema, files.users, options)
        load_histories(store, namespace, files.histories, HistoryOptions(keep=files.keep_events))


def item_row_schema(schema: FeatureSchema) -> RowSchema:
    """The model's item features, and an embedding that makes a row as long as it is to be.

    Raises:
        ConfigError: the item features alone take more.
    """
    numeric = tuple(RowColumn(column.name, ColumnKind.NUMERIC) for column in schema.item_numeric)
    columns = (*numeric, *map(_categorical, schema.item_categorical))
    room = ROW_BYTES // WORD_BYTES - RowSchema("items", ITEM_KEY, columns).row_words
    if room < 1:
        raise ConfigError(f"the item features of this model take more than the {ROW_BYTES} bytes of a row")
    return RowSchema("items", ITEM_KEY, (*columns, RowColumn("embedding", ColumnKind.EMBEDDING, room)))


def item_frame(catalogue: Catalogue, schema: FeatureSchema, seed: int, places: Array | None = None) -> pl.DataFrame:
    """The rows of all items, or of those at some places of the catalogue."""
    chosen = np.arange(len(catalogue.ids.items)) if places is None else places
    rows = chosen + FIRST_ITEM_ROW
    columns: dict[str, object] = {ITEM_KEY: pl.Series(catalogue.ids.items).gather(chosen)}
    for number, column in enumerate(schema.item_numeric):
        columns[column.name] = catalogue.items.numeric[rows, number]
    columns |= _texts(catalogue, "item", schema.item_categorical, catalogue.items.categories[rows])
    width = item_row_schema(schema).columns[-1].width
    numbers = np.random.default_rng(seed).standard_normal((len(chosen), width), np.float32)
    columns["embedding"] = pl.Series(numbers, dtype=pl.Array(pl.Float32, width))
    return pl.DataFrame(columns)


def packed_items(catalogue: Catalogue, schema: FeatureSchema, seed: int, places: Array) -> Array:
    """(n, words) uint32, the rows of items at some places of the catalogue as a store has them."""
    return pack_rows(item_row_schema(schema), item_frame(catalogue, schema, seed, places), schema.log_end).words


def _categorical(column: Categorical) -> RowColumn:
    return RowColumn(column.name, ColumnKind.CATEGORICAL)


def _texts(
    catalogue: Catalogue, side: str, columns: tuple[Categorical, ...], codes: Int32Array
) -> dict[str, pl.Series]:
    """The words behind codes (n, G): one code a column, and none missing, as the made-up catalogues are."""
    return {
        column.name: pl.Series(catalogue.vocabulary(side, column.name)).gather(codes[:, number] - column.offset)
        for number, column in enumerate(columns)
    }


def _history_frame(catalogue: Catalogue, schema: FeatureSchema) -> pl.DataFrame:
    people, history = catalogue.users, catalogue.users.history
    lengths = np.diff(people.offsets)
    columns: dict[str, object] = {
        USER_KEY: pl.Series(catalogue.ids.users).gather(np.repeat(np.arange(len(lengths)), lengths)),
        ITEM_KEY: pl.Series(catalogue.ids.items).gather(history.rows - FIRST_ITEM_ROW),
        "time": history.times,
        "event": pl.Series(schema.event_types).gather(history.events),
    }
    for number, value in enumerate(schema.event_values):
        columns[value.name] = history.values[:, number]
    return pl.DataFrame(columns)
