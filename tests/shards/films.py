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
from rankd.models.protocol import create_model
from rankd.train.recipe import ModelChoice
from tests.train.small_log import RECIPE, small_dataset

DATASET = small_dataset()
USERS, ITEMS = DATASET.log.user_ids, DATASET.log.item_ids
REQUESTS = [RankRequest(user, (*ITEMS[:9], "unheard of", ITEMS[3])) for user in (*USERS[:5], "nobody")]
ENGINE = EngineConfig(executors=1)


def build(root: Path) -> Path:
    """Write a version of random weights; returns its folder."""
    torch.manual_seed(1)
    model = create_model("dlrm", DATASET.schema, {})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    recipe = msgspec.structs.replace(RECIPE, model=ModelChoice("dlrm", {}))
    options = BuildOptions("films", "1", tables=TableStorage.FP32)
    return build_artifact(root, model.eval(), DATASET, recipe, options)
