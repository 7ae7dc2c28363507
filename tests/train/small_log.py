"""A small synthetic log and a dataset of it, shared by the tests of training and building."""

from __future__ import annotations

from functools import cache

import polars as pl
import torch

from rankd.features.schema import Strategy, SubSequence
from rankd.train.description import LogDescription
from rankd.train.interactions import read_log
from rankd.train.recipe import ModelChoice, Recipe, Training
from rankd.train.run import packaged_or_file
from rankd.train.samples import Dataset, Shapes, prepare
from rankd.train.synthetic import synthetic_log

torch.set_num_threads(1)  # these models are too small to share; several threads only wait for each other

SHAPES = Shapes(
    sub_sequences=(SubSequence(Strategy.RECENT), SubSequence(Strategy.CATEGORY, column="genre")),
    history_length=12,
    history_buckets=(4, 12),
    candidate_buckets=(8, 64),
)
TRAINING = Training(epochs=2, batch_size=32, negatives=12, seed=3)
RECIPE = Recipe(ModelChoice("climber", {"width": 8, "heads": 2, "layers": 2, "hidden": 8}), SHAPES, TRAINING)


@cache
def small_frame() -> pl.DataFrame:
    """600 sessions of 80 users over 60 films."""
    return synthetic_log(seed=5, num_users=80, num_items=60, num_sessions=600)


@cache
def small_dataset(window_step: int = 1) -> Dataset:
    """The packed log."""
    import tempfile
    from pathlib import Path

    import msgspec

    shapes = msgspec.structs.replace(SHAPES, window_step=window_step)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.parquet"
        small_frame().write_parquet(path)
        return prepare(read_log(path, packaged_or_file(LogDescription, "logs", "demo")), shapes)
