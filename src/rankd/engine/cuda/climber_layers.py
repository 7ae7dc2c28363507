"""The Climber's layers and its fusion on the GPU: weights of all blocks stacked, and what launches them.

In: the state_dict of `models.climber.Climber`. Out: `RankerWeights` around `ClimberLayers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankd.engine.cuda.cuda_device import Device
from rankd.engine.cuda.gpu_presence import fusion_heads
from rankd.engine.cuda.kernels.triton_attention_steps import AttentionTables
from rankd.engine.cuda.kernels.triton_block_fusion import attend_blocks
from rankd.engine.cuda.kernels.triton_feed_forward import WIDEST_BYTES, FeedForward, feed_forward
from rankd.engine.cuda.kernels.triton_pieces import LOG2_E
from rankd.engine.cuda.kernels.triton_projection import Linear, project
from rankd.engine.cuda.ranker_weights import Joining, LayerRooms, RankerWeights, WeightReader
from rankd.features.schema import FeatureSchema


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer of all blocks; the feed-forward in one piece, or in two where it is wider than a kernel takes."""

    qkv: Linear
    out: Linear
    feed_forward: FeedForward | tuple[Linear, Linear]


@dataclass(frozen=True, slots=True)
class FusionWeights:
    """The fusion of the blocks. `scale` is that of a logit, in powers of two."""

    qkv: Linear
    out: Linear
    gate: tuple[Linear, Linear]
    heads: int
    scale: float


@dataclass(frozen=True, slots=True)
class ClimberLayers:
    """All layers, the first one first, and the fusion."""

    stack: tuple[LayerWeights, ...]
    fusion: FusionWeights

    @property
    def depth(self) -> int:
        """L."""
        return len(self.stack)

    def rooms(self, device: Device, rows: int, dtype: torch.dtype) -> LayerRooms:
        """Memory for R rows."""
        return ClimberRooms(device, self.stack, rows, dtype)

    def joining(self, device: Device, rows: int, dtype: torch.dtype, tokens: Tensor) -> Joining:
        """Bit-wise gating fusion."""
        return Fusion(device, self.fusion, rows, dtype, tokens)


class ClimberRooms:
    """Tokens on their way through the layers; see `LayerRooms`."""

    def __init__(self, device: Device, stack: tuple[LayerWeights, ...], rows: int, dtype: torch.dtype) -> None:
        self._stack = stack
        blocks, width, wide = stack[0].out.weight.shape
        self.tokens = device.empty((blocks, rows, width), torch.float32)
        self.qkv = device.empty((blocks, rows, 3 * wide), dtype)
        self.attended = device.empty((blocks, rows, wide), dtype)
        hidden = [one.feed_forward[0].weight.shape[1] for one in stack if isinstance(one.feed_forward, tuple)]
        self._hidden = device.empty((blocks, rows, max(hidden)), dtype) if hidden else None

    def project(self, depth: int, counts: Tensor) -> None:
        """Norm and projection."""
        project(self.qkv, self.tokens, self._stack[depth].qkv, counts)

    def finish(self, depth: int, counts: Tensor) -> None:
        """Projection, residual, feed-forward."""
        layer = self._stack[depth]
        project(self.tokens, self.attended, layer.out, counts, residual=self.tokens)
        if isinstance(layer.feed_forward, FeedForward):
            feed_forward(self.tokens, layer.feed_forward, counts)
        elif self._hidden is not None:
            up, down = layer.feed_forward
            project(self._hidden, self.tokens, up, counts)
            project(self.tokens, self._hidden, down, counts, residual=self.tokens)


class Fusion:
    """Attention over the blocks of a candidate, then Y = G x sigmoid(f(G)); see `Joining`."""

    def __init__(self, device: Device, weights: FusionWeights, rows: int, dtype: torch.dtype, tokens: Tensor) -> None:
        self._weights, self._tokens = weights, tokens
        blocks, _, width = tokens.shape
        wide = weights.out.weight.shape[2]
        self._qkv = device.empty((blocks, rows, 3 * wide), dtype)
        self._fused = device.empty((blocks, rows, wide), dtype)
        self._channels = device.empty((1, rows, blocks * width), torch.float32)
        self._squeezed = device.empty((1, rows, weights.gate[0].weight.shape[1]), dtype)
        self._gated = device.empty((1, rows, blocks * width), torch.float32)

    def __call__(self, counts: Tensor) -> Tensor:
        """The gated channels (1, R, N D)."""
        weights, tokens = self._weights, self._tokens
        project(self._qkv, tokens, weights.qkv, counts)
        attend_blocks(self._fused, self._qkv, counts, weights.heads, weights.scale)
        blocks, _, width = tokens.shape
        side_by_side = self._channels[0].unflatten(-1, (blocks, width)).transpose(0, 1)
        project(side_by_side, self._fused, weights.out, counts, residual=tokens)
        project(self._squeezed, self._channels, weights.gate[0], counts)
        project(self._gated, self._squeezed, weights.gate[1], counts, gated=self._channels)
        return self._gated


def climber_weights(reader: WeightReader, schema: FeatureSchema, options: Mapping[str, Any]) -> RankerWeights:
    """A Climber's. Raises KeyError for a state_dict of another model."""
    stack = tuple(_layer(reader, depth) for depth in range(reader.depth))
    temperature = reader.put(reader.of_layers("log_temperature").neg().exp() * LOG2_E)
    tables = AttentionTables(temperature, *reader.biases(LOG2_E))
    layers = ClimberLayers(stack, _fusion(reader, fusion_heads(options)))
    return reader.ranker(schema, stack[0].out.weight.shape[2], layers, tables)


def _layer(reader: WeightReader, depth: int) -> LayerWeights:
    names = reader.names(depth)
    out, down = (reader.stacked([reader.both(name + part) for name in names], False) for part in ("out", "ffn.3"))
    up = reader.stacked([reader.with_norm(f"{name}ffn.0", f"{name}ffn.1") for name in names], True, "gelu")
    whole = FeedForward(up.weight, up.bias, down.weight, down.bias)
    return LayerWeights(
        reader.stacked([reader.with_norm(f"{name}norm", f"{name}qkv") for name in names], True),
        out,
        whole if down.weight.shape[1] * down.weight.itemsize <= WIDEST_BYTES else (up, down),
    )


def _fusion(reader: WeightReader, heads: int) -> FusionWeights:
    out = reader.linear("fusion.out")
    scale = LOG2_E * (out.weight.shape[2] // heads) ** -0.5
    gate = reader.linear("fusion.gate.0", "relu"), reader.linear("fusion.gate.2")
    return FusionWeights(reader.normed("fusion.norm", "fusion.qkv"), out, gate, heads, scale)
