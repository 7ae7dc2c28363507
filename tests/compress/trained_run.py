"""A small trained run, for whatever is compressed in tests."""

from __future__ import annotations

from pathlib import Path

import msgspec

from rankd.train.description import LogDescription, Split
from rankd.train.recipe import ModelChoice
from rankd.train.run import begin_run, packaged_or_file
from rankd.train.samples import prepare
from rankd.train.trainer import Trainer
from tests.train.small_log import RECIPE, small_frame

WIDE = ModelChoice("climber", {"width": 32, "heads": 2, "layers": 1, "hidden": 16})
"""A model whose layers are large enough for int8."""


def train_small(folder: Path, split: Split | None = None, choice: ModelChoice | None = None) -> Path:
    """`<folder>/original`, one epoch on the small log beside it; the log's own split if none is given. A `choice` is
    trained for two epochs and faster, so that its scores differ."""
    data = folder / "log.parquet"
    small_frame().write_parquet(data)
    recipe = msgspec.structs.replace(RECIPE, training=msgspec.structs.replace(RECIPE.training, epochs=1))
    if choice is not None:
        training = msgspec.structs.replace(RECIPE.training, epochs=2, learning_rate=5e-3)
        recipe = msgspec.structs.replace(RECIPE, model=choice, training=training)
    description = packaged_or_file(LogDescription, "logs", "demo")
    description = msgspec.structs.replace(description, split=split or description.split)
    _, log = begin_run(folder / "original", data, description, recipe)
    Trainer(prepare(log, recipe.shapes), recipe, folder / "original").start()
    return folder / "original"
