"""A model's embedding tables as files beside its graph: written when it is built, and looked up for its checks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from rankd.embeddings.model_tables import open_model_tables
from rankd.embeddings.table_format import FOLDER
from rankd.embeddings.table_spec import TableSpec, TableStorage
from rankd.embeddings.table_writing import write_table
from rankd.errors import BuildError
from rankd.features.embedded import EmbeddedInputs
from rankd.features.schema import FeatureSchema
from rankd.models.protocol import EmbeddedModel
from rankd.types import Features

BLOCK_ROWS = 1 << 16


def write_tables(version: Path, model: nn.Module, storage: TableStorage) -> frozenset[int]:
    """Write the tables to `<version>/embeddings`; returns where their tensors lie in memory.

    Raises:
        BuildError: a model that has none, a name that is none for a file, or numbers that the storage does not hold.
    """
    if not isinstance(model, EmbeddedModel):
        raise BuildError(f"{type(model).__name__} has no tables that can be kept beside its graph")
    places, folder = set(), version / FOLDER
    folder.mkdir()
    for name, tensor in model.tables().items():
        places.add(tensor.data_ptr())
        rows, dim = tensor.shape
        table = tensor.detach()
        blocks = (table[first : first + BLOCK_ROWS].numpy() for first in range(0, rows, BLOCK_ROWS))
        write_table(folder, TableSpec(name, rows, dim, storage), blocks)
    return frozenset(places)


def embedded_requests(version: Path, schema: FeatureSchema, requests: Sequence[Features]) -> Sequence[Features]:
    """The requests with what the version's tables give for them; as they are where it has none.

    Raises:
        ArtifactError: its tables cannot be opened.
    """
    if not schema.embedded:
        return requests
    with open_model_tables(version, schema.embedded_widths) as tables:
        inputs = EmbeddedInputs(schema, tables)
        return [inputs.embed(features) for features in requests]
