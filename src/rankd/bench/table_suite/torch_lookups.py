"""The peers: torch's EmbeddingBag, its quantized kin, and FBGEMM's batched tables where that is installed.

In: our tables and requests. Out: calls, each of which answers a request with the sums, table by table or side by side.
What a peer wants of a request (tensors, offsets from 0) is made before any clock runs. Their rows lie on huge pages.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rankd.bench.table_suite.huge_memory import huge_memory
from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.row_storage import SCALED
from rankd.embeddings.table_file import Table
from rankd.embeddings.table_spec import ROW_BYTES, TableStorage
from rankd.types import Array

if TYPE_CHECKING:
    from torch import Tensor

Call = Callable[[int], "list[Tensor]"]
"""The sums for a request by its number: (B, D) of each table, or (B, W) of all in one."""


def peer_calls(tables: Sequence[Table], asked: Sequence[JaggedIds]) -> dict[str, Call]:
    """By the name of the contestant."""
    calls = {"torch": _torch_call(tables, asked)}
    if importlib.util.find_spec("fbgemm_gpu") is not None:
        calls["fbgemm"] = _fbgemm_call(tables, asked)
    return calls


def _torch_call(tables: Sequence[Table], asked: Sequence[JaggedIds]) -> Call:
    import torch

    storage = tables[0].spec.storage
    kind = {TableStorage.FP32: torch.float32, TableStorage.FP16: torch.float16}.get(storage, torch.uint8)
    weights = [torch.from_numpy(_on_huge_pages(_as_torch_has_it(table))).view(kind) for table in tables]
    inputs = [_split(one) for one in asked]
    quantized: Any = torch.ops.quantized
    if storage in SCALED:
        bag = {
            TableStorage.INT8: quantized.embedding_bag_byte_rowwise_offsets,
            TableStorage.INT4: quantized.embedding_bag_4bit_rowwise_offsets,
        }[storage]

        def call(number: int) -> list[Tensor]:
            pairs = zip(weights, inputs[number], strict=True)
            return [bag(weight, ids, offsets, include_last_offset=True) for weight, (ids, offsets) in pairs]

        return call
    modules = [torch.nn.EmbeddingBag.from_pretrained(one, mode="sum", include_last_offset=True) for one in weights]

    def pooled(number: int) -> list[Tensor]:
        with torch.inference_mode():
            return [bag(*one) for bag, one in zip(modules, inputs[number], strict=True)]

    return pooled


def _as_torch_has_it(table: Table) -> Array:
    """(n, bytes of a row) uint8: ours, save that torch's int4 has scale and offset in fp16."""
    if table.spec.storage is not TableStorage.INT4:
        return table.records
    return np.concatenate([table.records[:, : -ROW_BYTES[table.spec.storage]], _half_scales(table)], axis=1)


def _half_scales(table: Table) -> Array:
    """(n, 4) uint8: scale and offset in fp16."""
    scales = np.ascontiguousarray(table.records[:, -ROW_BYTES[table.spec.storage] :]).view(np.float32)
    return scales.astype(np.float16).view(np.uint8)


def _on_huge_pages(records: Array) -> Array:
    copy = huge_memory(records.size).reshape(records.shape)
    copy[:] = records
    return copy


def _split(asked: JaggedIds) -> list[tuple[Tensor, Tensor]]:
    """Ids and offsets of each table."""
    import torch

    samples, made = asked.num_samples, []
    for f in range(len(asked.tables)):
        offsets = asked.offsets[f * samples : (f + 1) * samples + 1]
        ids = asked.ids[offsets[0] : offsets[-1]]
        made.append((torch.from_numpy(ids), torch.from_numpy(offsets - offsets[0])))
    return made


def _fbgemm_call(tables: Sequence[Table], asked: Sequence[JaggedIds]) -> Call:
    """Its tables in one: rows of the integers have scale and offset in fp16, before the integers."""
    import torch

    inference: Any = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_inference")
    common: Any = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_common")
    kinds: Any = importlib.import_module("fbgemm_gpu.split_embedding_configs").SparseType
    kind, host = kinds[tables[0].spec.storage.name], common.EmbeddingLocation.HOST
    specs = [(one.spec.name, len(one.records), one.spec.dim, kind, host) for one in tables]
    batched = inference.IntNBitTableBatchedEmbeddingBagsCodegen(
        specs, output_dtype=kinds.FP32, device="cpu", pooling_mode=common.PoolingMode.SUM
    )
    batched.initialize_weights()
    batched.weights_host = torch.from_numpy(huge_memory(batched.weights_host.numel()))
    for table, (weights, scales) in zip(tables, batched.split_embedding_weights(), strict=True):
        if table.spec.storage in SCALED:
            weights.copy_(torch.from_numpy(table.records[:, : -ROW_BYTES[table.spec.storage]].copy()))
            scales.copy_(torch.from_numpy(_half_scales(table)))
        else:
            weights.copy_(torch.from_numpy(table.records.copy()))
    inputs = [tuple(torch.from_numpy(part.astype(np.int32)) for part in (one.ids, one.offsets)) for one in asked]

    def call(number: int) -> list[Tensor]:
        return [batched(*inputs[number])]

    return call
