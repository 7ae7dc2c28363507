"""Tables by row: what is known of every item and every user, as columns that assembly gathers from.

`ItemTable` is one moment's knowledge (popularity and price change): training holds a table for each snapshot of the
log, an artifact carries the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rankd.features.schema import Categorical, FeatureSchema, Numeric
from rankd.types import Float32Array, Int32Array


@dataclass(frozen=True, slots=True)
class ItemTable:
    """Items by row: categories (I, G) int32 codes; numeric (I, F) float32 normalised, item columns only;
    neighbours (I, M) int32 rows of similar items, 0-padded, with similarities (I, M) float32 in 0..1.
    """

    categories: Int32Array
    numeric: Float32Array
    neighbours: Int32Array
    similarities: Float32Array


@dataclass(frozen=True, slots=True)
class UserFeatures:
    """One user: categories (G,) int32 codes, numeric (F,) float32 normalised."""

    categories: Int32Array
    numeric: Float32Array


def no_user_features(schema: FeatureSchema) -> UserFeatures:
    """What is known of a user of whom nothing is known: every value missing."""
    return UserFeatures(np.zeros(schema.user_columns, np.int32), np.zeros(len(schema.user_numeric), np.float32))


def normalise(column: Numeric, raw: Float32Array) -> Float32Array:
    """Raw values, NaN where missing, to what the model sees; missing becomes 0, the mean. Any shape."""
    values = np.log1p(np.maximum(raw, 0.0)) if column.log1p else raw
    result: Float32Array = np.nan_to_num((values - column.mean) / column.std, nan=0.0).astype(np.float32)
    return result


def encode_values(column: Categorical, vocabulary: Sequence[str], raws: Iterable[str | None]) -> Int32Array:
    """Codes (n, width) int32 of n raw values; None, and what training never saw, become code 0."""
    codes_of = {value: column.offset + code for code, value in enumerate(vocabulary)}
    rows = []
    for raw in raws:
        parts = () if raw is None else dict.fromkeys(split_words(raw)) if column.words else (raw,)
        known = [codes_of[part] for part in parts if part in codes_of][: column.width]
        rows.append(known + [0] * (column.width - len(known)))
    return np.asarray(rows, np.int32).reshape(-1, column.width)


def split_words(text: str) -> list[str]:
    """The words of a text column: lower case, letters and digits alone, two characters or more."""
    return re.findall(r"[a-z0-9]{2,}", text.lower())
