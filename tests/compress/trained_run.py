"""A small trained run, for whatever is compressed in tests."""

from __future__ import annotations

from pathlib import Path

import msgspec

from rankd.train.description import LogDescription, Split
from rankd.train.run import begin_run, packaged_or_file
from rankd.train.samples import prepare
from rankd.train.trainer import Trainer
from tests.train.small_log import RECIPE, small_frame


def train_small(folder: Path, split: Split | None = None, **options: int) -> Path:
    """`<folder>/original`, one epoch on the small log beside it; the log's own split if none is given. `options` go to
    the model, over those of the small recipe."""
    data = folder / "log.parquet"
    small_frame().write_parquet(data)
    model = msgspec.structs.replace(RECIPE.model, options=RECIPE.model.options | options)
    training = msgspec.structs.replace(RECIPE.training, epochs=1)
    recipe = msgspec.structs.replace(RECIPE, model=model, training=training)
    description = packaged_or_file(LogDescription, "logs", "demo")
    description = msgspec.structs.replace(description, split=split or description.split)
    _, log = begin_run(folder / "original", data, description, recipe)
    Trainer(prepare(log, recipe.shapes), recipe, folder / "original").start()
    return folder / "original"
