"""Packaged recipes: each is read, and the DLRM's trains and is built, here on a synthetic log for a few steps."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import msgspec
import numpy as np
import pytest

from rankd import Ranker, RankRequest
from rankd.build.pack import BuildOptions, build_artifact
from rankd.embeddings.table_spec import TableStorage
from rankd.engine.backend import EngineConfig
from rankd.models.protocol import create_model
from rankd.train.description import LogDescription
from rankd.train.interactions import read_log
from rankd.train.recipe import Recipe
from rankd.train.run import packaged_or_file
from rankd.train.samples import prepare
from rankd.train.trainer import Trainer
from tests.train.small_log import small_dataset, small_frame

FOLDER = resources.files("rankd.train").joinpath("recipes")
NAMES = sorted(entry.name.removesuffix(".toml") for entry in FOLDER.iterdir() if entry.name.endswith(".toml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_packaged_recipe_names_a_model_that_takes_its_options(name: str) -> None:
    recipe = packaged_or_file(Recipe, "recipes", name)
    create_model(recipe.model.kind, small_dataset().schema, recipe.model.options)


def test_the_dlrm_for_a_shop_learns_and_is_served_with_its_tables_beside_the_graph(tmp_path: Path) -> None:
    recipe = packaged_or_file(Recipe, "recipes", "online-retail-dlrm")
    recipe = msgspec.structs.replace(recipe, training=msgspec.structs.replace(recipe.training, epochs=2))
    small_frame().write_parquet(tmp_path / "log.parquet")
    log = read_log(tmp_path / "log.parquet", packaged_or_file(LogDescription, "logs", "demo"))
    dataset = prepare(log, recipe.shapes)
    trainer = Trainer(dataset, recipe, tmp_path / "run")
    history = trainer.start()
    assert history[1]["loss"] < 0.98 * history[0]["loss"]
    options = BuildOptions("shop", "1", tables=TableStorage.INT8)
    place = build_artifact(tmp_path / "models", trainer.model.eval(), dataset, recipe, options)
    with Ranker.load(place, EngineConfig(executors=1)) as ranker:
        scores = ranker.rank(RankRequest(log.user_ids[0], tuple(log.item_ids[:9])))
    assert np.ptp(scores.scores) > 0.0
