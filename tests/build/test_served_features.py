"""Feature parity: what offline evaluation packs from the log, a server packs from its store, for the same time.

The artifact served here knows no item features and only the first events of each user. The features reach it through a
file, `rankd features load` and a real store; the other events were posted to another server on that store. The scores
have to be those of torch on the whole log.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rankd import Client, Event, RankRequest
from rankd.build.pack import BuildOptions, Contents, catalogue_of, pack, parity_requests
from rankd.features.catalogue import Catalogue, UserTable
from rankd.features.feature_config import FeatureConfig
from rankd.features.filling.exporting import item_frame, user_frame
from rankd.features.filling.loading import LoadOptions, load_rows
from rankd.features.stores.open_store import open_store
from rankd.features.stores.store_config import StoreConfig
from rankd.models.protocol import create_model
from rankd.train.samples import Dataset, Sample
from rankd.train.trainer import torch_scorer
from rankd.types import UserHistory
from tests.features.stores.redis_server import running_redis
from tests.serve.filled_store import features, serving
from tests.train.small_log import RECIPE, small_dataset

DATASET = small_dataset(window_step=3)
SCHEMA = DATASET.schema
NOW = SCHEMA.log_end + 3600
USERS = range(0, len(DATASET.users), 7)


def made() -> nn.Module:
    torch.manual_seed(2)
    model = create_model("climber", SCHEMA, RECIPE.model.options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def known_early(whole: Catalogue, until: int) -> Catalogue:
    """The catalogue with item and user features of nobody and the events up to a moment."""
    histories = [whole.users.history_of(user) for user in range(len(whole.ids.users))]
    early = [history.until(int(np.searchsorted(history.times, until, side="right"))) for history in histories]
    rows, events, times, values = (
        np.concatenate([getattr(one, name) for one in early]) for name in ("rows", "events", "times", "values")
    )
    packed = UserHistory(rows, events, times, values)
    users = UserTable(
        np.zeros_like(whole.users.categories), whole.users.numeric, np.cumsum([0, *map(len, early)]), packed
    )
    return Catalogue(whole.ids, replace(whole.items, numeric=np.zeros_like(whole.items.numeric)), users)


def later_events(dataset: Dataset, whole: Catalogue, user: int, until: int) -> tuple[Event, ...]:
    """The events of a user after a moment, as a client posts them: ids, names and raw values."""
    history = dataset.histories[user]
    later = history.last(len(history) - int(np.searchsorted(history.times, until, side="right")))
    return tuple(
        Event(whole.item_id(row), SCHEMA.event_types[event], time)
        for row, event, time in zip(later.rows.tolist(), later.events.tolist(), later.times.tolist(), strict=True)
    )


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return made()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, model: nn.Module) -> Path:
    """A repository with an artifact that knows little."""
    root = tmp_path_factory.mktemp("models")
    early = known_early(catalogue_of(DATASET), _middle())
    contents = Contents(model, "climber", SCHEMA, early, parity_requests(DATASET, 4), RECIPE.model.options)
    pack(root, contents, BuildOptions("films", "1"))
    return root


@pytest.fixture(params=["lmdb", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FeatureConfig]:
    """Item and user features in a store, from files."""
    if request.param == "lmdb":
        _fill(f"lmdb:{tmp_path / 'store'}", tmp_path)
        yield FeatureConfig(StoreConfig(url=f"lmdb:{tmp_path / 'store'}"))
    else:
        with running_redis(tmp_path / "redis") as redis:
            _fill(redis.url, tmp_path)
            yield features(redis.url)


def test_a_server_scores_as_offline_evaluation_does(model: nn.Module, models: Path, store: FeatureConfig) -> None:
    whole, scorer = catalogue_of(DATASET), torch_scorer(model, DATASET)
    rows = DATASET.snapshots[-1].known[:40].astype(np.int32)
    candidates = tuple(whole.item_id(int(row)) for row in rows)
    with (
        serving(models, store) as first,
        serving(models, store) as second,
        Client(first.url) as writer,
        Client(second.url) as reader,
    ):
        posted = 0
        for user in USERS:
            events = later_events(DATASET, whole, user, _middle())
            if events:
                writer.append_events(whole.ids.users[user], events)
                posted += len(events)
        assert posted > 20
        for user in USERS:
            expected = scorer(Sample(user, NOW, len(DATASET.tables) - 1, rows, np.zeros((0, 2), np.float32)), rows)
            answer = reader.rank(RankRequest(whole.ids.users[user], candidates, time=NOW))
            assert answer.degraded == ()
            assert answer.rows["items"].fresh == len(rows)
            np.testing.assert_allclose(answer.scores, expected, atol=1e-3)


def _middle() -> int:
    return int(np.quantile(DATASET.log.times, 0.6))


def _fill(url: str, folder: Path) -> None:
    opened = open_store(StoreConfig(url=url))
    try:
        for name, export in (("items", item_frame), ("users", user_frame)):
            declared, frame = export(catalogue_of(DATASET), SCHEMA)
            path = folder / f"{name}.parquet"
            frame.write_parquet(path)
            load_rows(opened, "films", declared, path, LoadOptions(grace_seconds=0))
    finally:
        opened.close()
