"""HSTU's layers on the GPU: attention without softmax, gates in place of a feed-forward.

In: the state_dict of `models.hstu.Hstu`. Out: `RankerWeights` around `HstuLayers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankd.engine.cuda.cuda_device import Device
from rankd.engine.cuda.kernels.triton_attention_steps import AttentionTables, Weighting
from rankd.engine.cuda.kernels.triton_gated_output import GatedOutput, finish_gated
from rankd.engine.cuda.kernels.triton_projection import Linear, project
from rankd.engine.cuda.ranker_weights import Joining, LayerRooms, RankerWeights, WeightReader
from rankd.features.schema import FeatureSchema
from rankd.models.layer_shapes import HstuForm

EPSILON = 1e-6
"""Of the norms of its layers, as in models.hstu."""


@dataclass(frozen=True, slots=True)
class HstuLayerWeights:
    """One layer of all blocks: queries, keys, values and gates of one projection, in this order, and what follows."""

    qkvu: Linear
    out: GatedOutput


@dataclass(frozen=True, slots=True)
class HstuLayers:
    """All layers, the first one first."""

    stack: tuple[HstuLayerWeights, ...]

    @property
    def depth(self) -> int:
        """L."""
        return len(self.stack)

    def rooms(self, device: Device, rows: int, dtype: torch.dtype) -> LayerRooms:
        """Memory for R rows."""
        return HstuRooms(device, self.stack, rows, dtype)

    def joining(self, device: Device, rows: int, dtype: torch.dtype, tokens: Tensor) -> Joining:
        """The blocks' outputs side by side; of one block they are what they are."""
        blocks, _, width = tokens.shape
        if blocks == 1:
            return lambda counts: tokens
        channels = device.empty((1, rows, blocks * width), torch.float32)
        side_by_side = channels[0].unflatten(-1, (blocks, width)).transpose(0, 1)

        def join(counts: Tensor) -> Tensor:
            side_by_side.copy_(tokens)
            return channels

        return join


class HstuRooms:
    """Tokens on their way through the layers; see `LayerRooms`."""

    def __init__(self, device: Device, stack: tuple[HstuLayerWeights, ...], rows: int, dtype: torch.dtype) -> None:
        self._stack = stack
        blocks, four_wide, width = stack[0].qkvu.weight.shape
        wide = four_wide // 4
        self.tokens = device.empty((blocks, rows, width), torch.float32)
        self._qkvu = device.empty((blocks, rows, four_wide), dtype)
        self.qkv, self._gates = self._qkvu[..., : 3 * wide], self._qkvu[..., 3 * wide :]
        self.attended = device.empty((blocks, rows, wide), dtype)

    def project(self, depth: int, counts: Tensor) -> None:
        """Norm, projection, activation."""
        project(self._qkvu, self.tokens, self._stack[depth].qkvu, counts)

    def finish(self, depth: int, counts: Tensor) -> None:
        """Norm, gates, projection, residual."""
        finish_gated(self.tokens, self.attended, self._gates, self._stack[depth].out, counts)


def hstu_weights(reader: WeightReader, schema: FeatureSchema, options: Mapping[str, Any]) -> RankerWeights:
    """An HSTU's. Raises KeyError for a state_dict of another model."""
    form = HstuForm(options.get("form", HstuForm.PAPER.value))
    stack = tuple(_layer(reader, depth, form) for depth in range(reader.depth))
    wide = stack[0].out.norm.shape[2]
    positions, times = reader.biases(1.0)
    heads = positions.shape[2]
    temperature = 1.0 if form is HstuForm.PAPER else (heads / wide) ** 0.5
    tables = AttentionTables(
        reader.put(torch.full((reader.blocks, reader.depth, heads), temperature)),
        positions,
        times,
        Weighting.POINTWISE,
        1.0 / schema.history_length,
    )
    return reader.ranker(schema, wide, HstuLayers(stack), tables)


def _layer(reader: WeightReader, depth: int, form: HstuForm) -> HstuLayerWeights:
    names = reader.names(depth)
    projections = [reader.with_norm(f"{name}norm", f"{name}uqkv") for name in names]
    wide = projections[0][1].shape[0] // 4
    gates_last = [(weight.roll(-wide, 0), bias.roll(-wide, 0)) for weight, bias in projections]
    activated_from = 0 if form is HstuForm.PAPER else 3 * wide
    out = reader.stacked([reader.both(f"{name}out") for name in names], False)
    norms = torch.stack([torch.stack(reader.both(f"{name}attended_norm")) for name in names])
    return HstuLayerWeights(
        reader.stacked(gates_last, True, "silu", activated_from, EPSILON),
        GatedOutput(out.weight, out.bias, reader.put(norms), EPSILON),
    )
