"""Reading an interaction log: Parquet or CSV plus a description -> columns sorted by time, and a count of every row.

No row disappears silently: each is kept, merged, or stands in the report under the rule that took it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from rankd.errors import DataError, nearest
from rankd.features.schema import FIRST_ITEM_ROW
from rankd.train.description import Action, FeatureColumn, LogDescription, RowRule, ValueColumn
from rankd.types import Float32Array, Int32Array, Int64Array

ANONYMOUS = -1
_RESERVED = "__rankd_"


@dataclass(frozen=True, slots=True)
class InteractionLog:
    """n events sorted by time (ties in file order).

    users (n,) int32, ANONYMOUS where nobody; rows (n,) int32 item rows; events (n,) int32 types; times (n,) int64
    seconds since 1970 UTC; baskets (n,) int64; values (n, E) float32 raw. `item_ids[r - 2]` is the id of item row r.
    `frame` keeps the description's feature columns beside them, row for row.
    """

    description: LogDescription
    users: Int32Array
    rows: Int32Array
    events: Int32Array
    times: Int64Array
    baskets: Int64Array
    values: Float32Array
    item_ids: tuple[str, ...]
    item_names: tuple[str, ...]
    user_ids: tuple[str, ...]
    event_types: tuple[str, ...]
    frame: pl.DataFrame
    report: dict[str, int]

    @property
    def num_item_rows(self) -> int:
        """I: padding, unknown and every item."""
        return FIRST_ITEM_ROW + len(self.item_ids)

    def before(self, time: int) -> slice:
        """The events strictly before a moment."""
        return slice(0, int(np.searchsorted(self.times, time, side="left")))


def read_log(path: Path, description: LogDescription) -> InteractionLog:
    """Read and clean a log.

    Raises:
        DataError: no such file, a format that is not read, a missing column, an unusable type, or no row left.
    """
    frame = _read_file(path)
    _check_columns(frame, description, path)
    report = {"rows in the file": frame.height}
    frame = _typed(frame, description)
    frame = _apply_rules(frame, description, report)
    frame = _merge_lines(frame, report)
    report["events kept"] = frame.height
    report["of these anonymous"] = frame.filter(pl.col(_RESERVED + "user").is_null()).height
    if frame.height == report["of these anonymous"]:
        raise DataError(f"{path}: no event of a known user is left after the row rules; counted were {report}")
    return _to_log(frame, description, report)


def _read_file(path: Path) -> pl.DataFrame:
    readers = {".parquet": pl.read_parquet, ".csv": pl.read_csv}
    if path.suffix not in readers:
        raise DataError(f"{path}: unknown format '{path.suffix}'; an interaction log is .parquet or .csv")
    try:
        if path.suffix == ".csv":
            return pl.read_csv(path, infer_schema_length=None)
        return pl.read_parquet(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: cannot be read as {path.suffix}: {error}") from error


def _check_columns(frame: pl.DataFrame, description: LogDescription, path: Path) -> None:
    columns = description.columns
    wanted = {"columns." + key: name for key in columns.__struct_fields__ if (name := getattr(columns, key))}
    wanted |= {f"rows '{rule.name}'": rule.column for rule in description.rows}
    features: list[FeatureColumn | ValueColumn] = [*description.item_features, *description.user_features]
    features += description.event_values
    wanted |= {f"feature '{feature.name}'": feature.column for feature in features}
    for where, name in wanted.items():
        if name not in frame.columns:
            known = ", ".join(frame.columns)
            raise DataError(
                f"{path}: {where} names column '{name}', the file has {known}.{nearest(name, frame.columns)}"
            )


def _typed(frame: pl.DataFrame, description: LogDescription) -> pl.DataFrame:
    """Adds our own columns: user and item as text, time in seconds, basket as text, event, and no rule yet."""
    columns = description.columns
    time = pl.col(columns.time)
    kind = frame.schema[columns.time]
    if kind == pl.String:
        time = time.str.to_datetime(strict=False)
    if kind.is_integer():
        seconds = time.cast(pl.Int64)
    elif kind in (pl.Date, pl.String) or isinstance(kind, pl.Datetime):
        seconds = time.cast(pl.Datetime("us")).dt.epoch("s")
    else:
        raise DataError(f"column '{columns.time}' is {kind}; a time is a timestamp, a date or whole seconds since 1970")
    item = pl.col(columns.item).cast(pl.String)
    basket = pl.col(columns.basket).cast(pl.String) if columns.basket else seconds.cast(pl.String)
    return frame.with_columns(
        pl.col(columns.user).cast(pl.String).alias(_RESERVED + "user"),
        (item.str.to_uppercase() if description.item_upper_case else item).alias(_RESERVED + "item"),
        seconds.alias(_RESERVED + "time"),
        basket.alias(_RESERVED + "basket"),
        (pl.col(columns.event).cast(pl.String) if columns.event else pl.lit(description.default_event)).alias(
            _RESERVED + "event"
        ),
    )


def _apply_rules(frame: pl.DataFrame, description: LogDescription, report: dict[str, int]) -> pl.DataFrame:
    """Each row goes to the first rule that takes it; what `drop` takes leaves the log and is counted."""
    for column in ("item", "time"):
        missing = frame[_RESERVED + column].is_null()
        if missing.any():
            report[f"dropped: no usable {column}"] = int(missing.sum())
            frame = frame.filter(~missing)
    taken = pl.Series(np.zeros(frame.height, bool))
    keep = pl.Series(np.ones(frame.height, bool))
    user, event = frame[_RESERVED + "user"], frame[_RESERVED + "event"]
    for rule in description.rows:
        mask = frame.select(_condition(rule).fill_null(value=False)).to_series() & ~taken
        report[f"{rule.action.value}: {rule.name}"] = int(mask.sum())
        taken |= mask
        match rule.action:
            case Action.DROP:
                keep &= ~mask
            case Action.ANONYMOUS:
                user = user.set(mask, None)
            case Action.EVENT:
                event = event.set(mask, rule.event)
    return frame.with_columns(user, event).filter(keep)


def _condition(rule: RowRule) -> pl.Expr:
    column = pl.col(rule.column)
    given = [bool(rule.matches), rule.below is not None, rule.missing]
    if sum(given) != 1 or (rule.action is Action.EVENT) != bool(rule.event):
        raise DataError(
            f"row rule '{rule.name}': give exactly one of matches, below and missing; "
            f'`event` goes with action = "event" and with nothing else'
        )
    if rule.matches:
        return column.cast(pl.String).str.contains(rule.matches)
    return column < rule.below if rule.below is not None else column.is_null()


def _merge_lines(frame: pl.DataFrame, report: dict[str, int]) -> pl.DataFrame:
    """Lines of one basket that name the same item and event become one, values added up."""
    key = [_RESERVED + name for name in ("user", "basket", "item", "event")]
    numeric = [name for name, kind in frame.schema.items() if kind.is_numeric() and not name.startswith(_RESERVED)]
    merged = (
        frame.with_row_index(_RESERVED + "line")
        .group_by(key, maintain_order=True)
        .agg(
            pl.exclude(*key, *numeric).first(),
            *(pl.col(name).first().alias(name) for name in numeric),
            *(pl.col(name).sum().alias(_RESERVED + "sum_" + name) for name in numeric),
        )
    )
    report["merged into another line of its basket"] = frame.height - merged.height
    return merged.sort(_RESERVED + "time", _RESERVED + "line")


def _to_log(frame: pl.DataFrame, description: LogDescription, report: dict[str, int]) -> InteractionLog:
    item_ids = frame[_RESERVED + "item"].unique(maintain_order=True)
    user_ids = frame[_RESERVED + "user"].drop_nulls().unique(maintain_order=True)
    event_types = tuple(sorted(frame[_RESERVED + "event"].unique()))
    for rule in description.tasks:
        for name in rule.events:
            if name not in event_types:
                raise DataError(f"task '{rule.name}' wants event '{name}', the log has {', '.join(event_types)}")
    names = item_ids
    if description.columns.item_name:
        names = (
            frame.group_by(_RESERVED + "item", maintain_order=True)
            .agg(pl.col(description.columns.item_name).drop_nulls().first())[description.columns.item_name]
            .fill_null("")
        )
    return InteractionLog(
        description=description,
        users=_codes(frame[_RESERVED + "user"], user_ids, ANONYMOUS),
        rows=_codes(frame[_RESERVED + "item"], item_ids, ANONYMOUS) + np.int32(FIRST_ITEM_ROW),
        events=_codes(frame[_RESERVED + "event"], pl.Series(event_types), ANONYMOUS),
        times=frame[_RESERVED + "time"].to_numpy(),
        baskets=frame[_RESERVED + "basket"].rank("dense").to_numpy().astype(np.int64),
        values=frame.select(
            pl.col(_RESERVED + "sum_" + value.column).cast(pl.Float32) for value in description.event_values
        )
        .to_numpy()
        .reshape(frame.height, -1),
        item_ids=tuple(item_ids),
        item_names=tuple(str(name) for name in names),
        user_ids=tuple(user_ids),
        event_types=event_types,
        frame=frame,
        report=report,
    )


def _codes(values: pl.Series, known: pl.Series, otherwise: int) -> Int32Array:
    """The position of each value in `known`, `otherwise` where it is null."""
    positions = values.replace_strict(known, np.arange(len(known)), default=None, return_dtype=pl.Int32)
    return positions.fill_null(otherwise).to_numpy().astype(np.int32)
