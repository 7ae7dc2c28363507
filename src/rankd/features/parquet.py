"""Filling a catalogue from Parquet: histories and item features that are fresher than the artifact's own.

histories: user_id, item_id, time (timestamp or seconds since 1970), and if wanted event and one column for each
           event value of the schema. They replace the artifact's histories.
items:     item_id, and any of the schema's item columns by name (numbers raw, as in the log). What a row has is put
           over the artifact's item of that id; ids that the model does not know are counted and passed over.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import polars as pl

from rankd.errors import DataError, nearest
from rankd.features.catalogue import Catalogue, Ids, UserTable
from rankd.features.schema import UNKNOWN_ROW, FeatureSchema
from rankd.features.tables import ItemTable, encode_values, normalise
from rankd.types import UserHistory

log = logging.getLogger("rankd")


def with_histories(catalogue: Catalogue, schema: FeatureSchema, path: Path) -> Catalogue:
    """The catalogue with the histories of a Parquet file in place of its own.

    Raises:
        DataError: unreadable, a column that is missing or of the wrong type, or an unknown event type.
    """
    frame = _read(path, ["user_id", "item_id", "time"])
    frame = frame.with_columns(pl.col("user_id", "item_id").cast(pl.String), _seconds(frame, path))
    frame = frame.drop_nulls(["user_id", "item_id", "time"]).sort("user_id", "time", maintain_order=True)
    users = frame["user_id"].unique(maintain_order=True)
    values = []
    for column in schema.event_values:
        raw = frame[column.name].cast(pl.Float32).to_numpy() if column.name in frame.columns else np.nan
        values.append(normalise(column, np.broadcast_to(np.asarray(raw, np.float32), frame.height)))
    history = UserHistory(
        rows=catalogue.rows_of(frame["item_id"].to_list()),
        events=_event_types(frame, schema, path),
        times=frame["time"].to_numpy(),
        values=np.stack(values, 1) if values else np.zeros((frame.height, 0), np.float32),
    )
    counts = frame.group_by("user_id", maintain_order=True).len()["len"].to_numpy()
    return Catalogue(
        Ids(catalogue.ids.items, catalogue.ids.item_names, tuple(users), catalogue.ids.vocabularies),
        catalogue.items,
        _users_of(catalogue, tuple(users), np.cumsum([0, *counts]), history),
    )


def with_items(catalogue: Catalogue, schema: FeatureSchema, path: Path) -> Catalogue:
    """The catalogue with the item features of a Parquet file put over its own.

    Raises:
        DataError: unreadable, or a column that the schema does not have.
    """
    frame = _read(path, ["item_id"])
    known = [column.name for column in schema.item_categorical] + [column.name for column in schema.item_numeric]
    for name in frame.columns:
        if name != "item_id" and name not in known:
            raise DataError(
                f"{path}: '{name}' is no item column of this model; it has {', '.join(known)}.{nearest(name, known)}"
            )
    rows = catalogue.rows_of(frame["item_id"].cast(pl.String).to_list())
    keep = rows != UNKNOWN_ROW
    if not keep.all():
        log.warning("%s: %d items that the model does not know are passed over", path, int((~keep).sum()))
    categories, numeric = catalogue.items.categories.copy(), catalogue.items.numeric.copy()
    start = 0
    for column in schema.item_categorical:
        if column.name in frame.columns:
            raws = frame[column.name].cast(pl.String).to_list()
            codes = encode_values(column, catalogue.vocabulary("item", column.name), raws)
            categories[rows[keep], start : start + column.width] = codes[keep]
        start += column.width
    for index, number in enumerate(schema.item_numeric):
        if number.name in frame.columns:
            raw = frame[number.name].cast(pl.Float32).fill_null(float("nan")).to_numpy()
            numeric[rows[keep], index] = normalise(number, raw)[keep]
    items = ItemTable(categories, numeric, catalogue.items.neighbours, catalogue.items.similarities)
    return Catalogue(catalogue.ids, items, catalogue.users)


def _read(path: Path, required: list[str]) -> pl.DataFrame:
    try:
        frame = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error
    for name in required:
        if name not in frame.columns:
            raise DataError(f"{path}: column '{name}' is missing; there are {', '.join(frame.columns)}")
    return frame


def _seconds(frame: pl.DataFrame, path: Path) -> pl.Expr:
    kind = frame.schema["time"]
    if isinstance(kind, pl.Datetime):
        return pl.col("time").dt.epoch("s")
    if kind.is_integer():
        return pl.col("time").cast(pl.Int64)
    raise DataError(f"{path}: time is {kind}; it has to be a timestamp or whole seconds since 1970")


def _event_types(frame: pl.DataFrame, schema: FeatureSchema, path: Path) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    if "event" not in frame.columns:
        usual = (schema.match_events or schema.event_types)[0]
        return np.full(frame.height, schema.event_types.index(usual), np.int32)
    for name in frame["event"].unique():
        if name not in schema.event_types:
            raise DataError(f"{path}: unknown event type '{name}'; this model has {', '.join(schema.event_types)}")
    codes = {name: index for index, name in enumerate(schema.event_types)}
    return frame["event"].replace_strict(codes, return_dtype=pl.Int32).to_numpy()


def _users_of(
    catalogue: Catalogue,
    users: tuple[str, ...],
    offsets: np.ndarray[tuple[int], np.dtype[np.int64]],
    history: UserHistory,
) -> UserTable:
    """The user table for another list of users: features of those that the artifact knows, none for the others."""
    known = {user: position for position, user in enumerate(catalogue.ids.users)}
    positions = np.asarray([known.get(user, -1) for user in users], np.int64)
    found = positions >= 0
    categories = np.zeros((len(users), catalogue.users.categories.shape[1]), np.int32)
    numeric = np.zeros((len(users), catalogue.users.numeric.shape[1]), np.float32)
    categories[found] = catalogue.users.categories[positions[found]]
    numeric[found] = catalogue.users.numeric[positions[found]]
    return UserTable(categories, numeric, offsets, history)
