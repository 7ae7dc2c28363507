"""A model whose tables are beside its graph, and requests of it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch
from torch import nn

from rankd import RankRequest
from rankd.build.pack import BuildOptions, build_artifact
from rankd.embeddings.table_spec import TableStorage
from rankd.engine.backend import EngineConfig
from rankd.models.protocol import EmbeddedModel, create_model
from rankd.train.recipe import ModelChoice
from rankd.train.samples import Dataset
from tests.train.small_log import RECIPE, small_dataset

DATASET = small_dataset()
USERS, ITEMS = DATASET.log.user_ids, DATASET.log.item_ids
REQUESTS = [RankRequest(user, (*ITEMS[:9], "unheard of", ITEMS[3])) for user in (*USERS[:5], "nobody")]
ENGINE = EngineConfig(executors=1)
OPTIONS = {"climber": {"layers": 1}, "hstu": {"layers": 1}}
"""Of a kind: what is in their layers is tested elsewhere, and takes time to export."""


def build(
    root: Path,
    kind: str = "dlrm",
    storage: TableStorage | None = TableStorage.FP32,
    dataset: Dataset = DATASET,
    targets: tuple[str, ...] = (),
) -> Path:
    """Write a version of random weights, always the same ones; returns its folder. Without `storage` its tables are in
    the graph; without `targets` it is for OpenVINO."""
    model = made(kind, dataset)
    recipe = msgspec.structs.replace(RECIPE, model=ModelChoice(kind, OPTIONS.get(kind, {})))
    options = BuildOptions("films", "1", targets=targets, tables=storage)
    return build_artifact(root, model, dataset, recipe, options)


def made(kind: str, dataset: Dataset = DATASET) -> nn.Module:
    """A model of random weights; row 0 of its tables is nobody's, as training leaves it."""
    torch.manual_seed(1)
    model = create_model(kind, dataset.schema, OPTIONS.get(kind, {}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    assert isinstance(model, EmbeddedModel)
    with torch.no_grad():
        for table in model.tables().values():
            table[0] = 0.0
    return model.eval()
