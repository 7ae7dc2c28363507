"""Item features that differ from the artifact's, in a real Redis, and a server that reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from rankd import Ranker
from rankd.features.feature_config import FeatureConfig, HistoriesConfig, Mode, RowsConfig
from rankd.features.filling.loading import LoadOptions, load_rows
from rankd.features.rows.row_schema import ColumnKind, RowColumn, RowSchema
from rankd.features.schema import FIRST_ITEM_ROW
from rankd.features.stores.open_store import open_store
from rankd.features.stores.store_config import StoreConfig
from rankd.serve.lifecycle import Server
from rankd.serve.settings import ServeConfig
from tests.features.stores.redis_server import RedisServer
from tests.serve.conftest import ONE_EXECUTOR

SCHEMA = RowSchema(
    "items",
    "item_id",
    (
        RowColumn("minutes", ColumnKind.NUMERIC),
        RowColumn("popularity", ColumnKind.NUMERIC),
        RowColumn("genre", ColumnKind.CATEGORICAL),
    ),
)


def item_frame(ranker: Ranker, seed: int = 1) -> pl.DataFrame:
    """New numbers for every item of the packaged model, some of them missing, and the genre that it has.

    Another genre would change what a file of items gives, which is read for histories too; a store's is for candidates.
    """
    random = np.random.default_rng(seed)
    items, genres = ranker.catalogue.ids.items, ranker.catalogue.vocabulary("item", "genre")
    codes = ranker.catalogue.items.categories[FIRST_ITEM_ROW:, 0] - ranker.schema.item_categorical[0].offset
    minutes = random.uniform(5, 60, len(items)).tolist()
    return pl.DataFrame(
        {
            "item_id": items,
            "minutes": [None if number % 7 == 0 else value for number, value in enumerate(minutes)],
            "popularity": random.uniform(0, 1, len(items)),
            "genre": [genres[code] for code in codes.tolist()],
        }
    )


def fill(url: str, path: Path, schema: RowSchema = SCHEMA, **store: Any) -> None:
    """Load a file of items into the store of the packaged model."""
    opened = open_store(StoreConfig(url=url, **store))
    try:
        load_rows(opened, "demo", schema, path, LoadOptions(grace_seconds=0), lambda done, total, line: None)
    finally:
        opened.close()


def features(url: str, mode: Mode = Mode.SYNC, ttl_seconds: float = 60.0, **more: Any) -> FeatureConfig:
    """How the servers of these tests read a store; they wait long, for machines are noisy."""
    store = {key: more.pop(key) for key in ("password", "timeout_ms", "write_timeout_ms") if key in more}
    return FeatureConfig(
        store=StoreConfig(url=url, **{"timeout_ms": 500.0, **store}),
        items=RowsConfig(mode, ttl_seconds, budget_mib=1.0),
        users=RowsConfig(mode, ttl_seconds, budget_mib=1.0),
        histories=HistoriesConfig(mode),
        **{"wait_ms": 500.0, **more},
    )


@contextmanager
def serving(models: Path, config: FeatureConfig) -> Iterator[Server]:
    """The packaged model over a store."""
    with Server(models, ServeConfig(port=0, engine=ONE_EXECUTOR, features=config)) as server:
        yield server


@contextmanager
def filled(redis: RedisServer, ranker: Ranker, folder: Path) -> Iterator[tuple[Path, Ranker]]:
    """New item features in Redis; with it the file and a ranker that has the same ones by another way."""
    path = folder / "items.parquet"
    item_frame(ranker).write_parquet(path)
    fill(redis.url, path)
    with Ranker.load(ranker.artifact.path, ONE_EXECUTOR, items=path) as expected:
        yield path, expected
