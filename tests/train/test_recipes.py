"""Packaged recipes: each is read; the DLRM's and the HSTU's train and are served, here from a synthetic log."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import msgspec
import numpy as np
import pytest

from rankd import Event, Ranker, RankRequest
from rankd.artifact import Artifact
from rankd.build.pack import BuildOptions, build_artifact
from rankd.embeddings.table_spec import TableStorage
from rankd.engine.backend import EngineConfig
from rankd.models.protocol import create_model
from rankd.train.description import LogDescription
from rankd.train.interactions import read_log
from rankd.train.recipe import ModelChoice, Recipe
from rankd.train.run import packaged_or_file
from rankd.train.samples import prepare
from rankd.train.trainer import Trainer
from tests.test_ranker import extend_always, fresh_scores
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


def test_the_hstu_for_a_shop_learns_and_is_served_from_its_states(tmp_path: Path) -> None:
    """A user who comes again is ranked from the state that is kept, and new events go to its end."""
    recipe = packaged_or_file(Recipe, "recipes", "online-retail-hstu")
    options = recipe.model.options | {"width": 16, "layers": 2, "deep_dropout": 0.0, "item_dropout": 0.1}
    training = msgspec.structs.replace(recipe.training, epochs=2, learning_rate=5e-3, negatives=20)
    shapes = msgspec.structs.replace(recipe.shapes, history_length=16, candidate_buckets=(16,))
    recipe = Recipe(ModelChoice("hstu", options), shapes, training)
    small_frame().write_parquet(tmp_path / "log.parquet")
    log = read_log(tmp_path / "log.parquet", packaged_or_file(LogDescription, "logs", "demo"))
    dataset = prepare(log, recipe.shapes)
    trainer = Trainer(dataset, recipe, tmp_path / "run")
    history = trainer.start()
    assert history[1]["loss"] < 0.98 * history[0]["loss"]
    built = BuildOptions("shop", "1", targets=("openvino", "onnxruntime"))
    place = build_artifact(tmp_path / "models", trainer.model.eval(), dataset, recipe, built)
    assert all(one.parity["fp32"] < 1e-3 for one in Artifact.open(place).manifest.engines.values())
    items, origins = tuple(log.item_ids[:9]), []
    with Ranker.load(place, EngineConfig(executors=1)) as ranker:
        extend_always(ranker)
        for number in range(3):
            ranker.append_events("newcomer", (Event(items[number], "click", ranker.schema.log_end + number),))
            for _ in range(2):
                answer = ranker.rank(RankRequest("newcomer", items, time=ranker.schema.log_end + 9))
                origins.append(answer.state)
                np.testing.assert_allclose(answer.scores, fresh_scores(ranker, "newcomer", items), atol=1e-4)
    assert origins == ["encoded", "cached", "extended", "cached", "extended", "cached"]
