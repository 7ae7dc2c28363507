"""A small hand-made schema, item table and histories for the tests of features and models."""

from __future__ import annotations

import numpy as np

from rankd.features.schema import (
    FIRST_ITEM_ROW,
    MATCH_FEATURES,
    Categorical,
    FeatureSchema,
    Numeric,
    Strategy,
    SubSequence,
    Task,
)
from rankd.features.tables import ItemTable, UserFeatures
from rankd.types import UserHistory

NUM_ITEMS = 30
DAY = 86_400


def make_schema(*strategies: SubSequence, history_length: int = 8) -> FeatureSchema:
    """Two categorical item columns (one multi-valued), a numeric one, a user column, an event value, two tasks."""
    return FeatureSchema(
        num_item_rows=FIRST_ITEM_ROW + NUM_ITEMS,
        event_types=("like", "view"),
        sub_sequences=strategies or (SubSequence(Strategy.RECENT), SubSequence(Strategy.DISTINCT)),
        history_length=history_length,
        history_buckets=(3, history_length),
        candidate_buckets=(4, 16),
        tasks=(Task("click"), Task("like", 0.5)),
        item_categorical=(Categorical("genre", 1, 4), Categorical("words", 5, 6, width=2, words=True)),
        item_numeric=(Numeric("price"),),
        user_categorical=(Categorical("country", 1, 3),),
        event_values=(Numeric("seconds"),),
        match=MATCH_FEATURES,
        match_events=("view",),
    )


def make_items(seed: int = 0) -> ItemTable:
    """Random features of every row; rows 0 and 1 have none."""
    random = np.random.default_rng(seed)
    rows = FIRST_ITEM_ROW + NUM_ITEMS
    categories = np.stack(
        [random.integers(1, 5, rows), random.integers(5, 11, rows), random.integers(5, 11, rows)], axis=1
    ).astype(np.int32)
    neighbours = random.integers(0, rows, (rows, 5)).astype(np.int32)
    similarities = np.where(neighbours < FIRST_ITEM_ROW, 0.0, random.random((rows, 5))).astype(np.float32)
    categories[:FIRST_ITEM_ROW] = 0
    return ItemTable(categories, random.normal(size=(rows, 1)).astype(np.float32), neighbours, similarities)


def make_user() -> UserFeatures:
    """A user of the second country."""
    return UserFeatures(np.asarray([2], np.int32), np.zeros(0, np.float32))


def make_history(rows: list[int], events: list[int] | None = None, times: list[int] | None = None) -> UserHistory:
    """A history of item rows; by default all views, a day apart, the first on day 1."""
    size = len(rows)
    return UserHistory(
        np.asarray(rows, np.int32),
        np.asarray([1] * size if events is None else events, np.int32),
        np.asarray([DAY * (n + 1) for n in range(size)] if times is None else times, np.int64),
        np.ones((size, 1), np.float32),
    )
