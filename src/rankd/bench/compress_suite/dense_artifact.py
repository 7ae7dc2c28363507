"""A trained model as somebody would serve it who wrote it down as its paper draws it: dense, and without a state.

In: a run's model. Out: a version folder like any other, for torch and for OpenVINO, from the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from torch import nn

from rankd.bench.engine_suite.dense_model import DenseRanker, dense_form
from rankd.build.pack import BuildOptions, build_artifact
from rankd.features.schema import FeatureSchema
from rankd.models.protocol import create_model
from rankd.train.recipe import ModelChoice, Recipe
from rankd.train.samples import Dataset


class DenseModel(DenseRanker):
    """The dense form of the built-in model `kind`, made by its `options`, so that an artifact can name it."""

    def __init__(self, schema: FeatureSchema, kind: str, options: Mapping[str, Any]) -> None:
        super().__init__(dense_form(create_model(kind, schema, options)).model)


KIND = f"{__name__}:{DenseModel.__name__}"


def build_dense(root: Path, model: nn.Module, dataset: Dataset, recipe: Recipe, options: BuildOptions) -> Path:
    """Write the dense form of a run's model; raises as `build_artifact`, and EngineFailure for a model without one."""
    choice = ModelChoice(KIND, {"kind": recipe.model.kind, "options": dict(recipe.model.options)})
    return build_artifact(root, dense_form(model), dataset, msgspec.structs.replace(recipe, model=choice), options)
