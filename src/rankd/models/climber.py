"""The Climber ranker (arXiv 2502.09888): multi-scale extraction, adaptive transformer blocks, bit-wise gating fusion.

In: N sub-sequences of the user's history, C candidates. Out: logits (B, C, K). The structure follows the paper's
description; sizes and initialisation are ours. What attends to what, and what is kept of it, is in `blocks.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankd.features.schema import FeatureSchema
from rankd.models.blocks import Block, BlockRanker, RelativeBias, direct_network, ranking_head
from rankd.models.layer_shapes import ClimberShape, FusionShape, LayerShape, climber_shape, even_fusion, even_layers
from rankd.models.projection import Projection
from rankd.models.tokens import TokenEmbedding


class Layer(nn.Module):
    """One pre-norm transformer layer: attention with relative bias and learned temperature, then feed-forward.

    Its attention is A = heads x head_width wide, which is D in a layer that nobody has pruned.
    """

    def __init__(self, width: int, shape: LayerShape, positions: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.attention_width = shape.heads, shape.attention_width
        self.norm = nn.LayerNorm(width)
        self.qkv = Projection(width, 3 * self.attention_width, shape.qkv_rank)
        self.out = Projection(self.attention_width, width, shape.out_rank)
        self.bias = RelativeBias(shape.heads, positions)
        # Takes the place of sqrt(D / H); one for each block, layer and head.
        self.log_temperature = nn.Parameter(torch.full((shape.heads,), 0.5 * math.log(shape.head_width)))
        self.ffn = nn.Sequential(
            nn.LayerNorm(width),
            Projection(width, shape.ffn, shape.up_rank),
            nn.GELU(),
            Projection(shape.ffn, width, shape.down_rank),
        )
        self.dropout = nn.Dropout(dropout)

    def normed(self, x: Tensor) -> Tensor:
        """What queries, keys and values are made of, from tokens (B, T, D)."""
        return self.qkv.reduced(self.norm(x))

    def keys_values(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, T, A)."""
        width = self.attention_width
        return self.qkv.rows(normed, slice(width, 2 * width)), self.qkv.rows(normed, slice(2 * width, 3 * width))

    def queries(self, normed: Tensor) -> Tensor:
        """Queries (B, H, Q, A / H), already over the temperature: it is folded into the weights."""
        scale = self.log_temperature.neg().exp().repeat_interleave(self.attention_width // self.heads)
        return self.split(self.qkv.rows(normed, slice(self.attention_width), scale))

    def attend(self, x: Tensor, normed: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """The next tokens (B, Q, D) of x; keys and values (B, T, A), bias (B, H, Q, T) with the mask in it."""
        attention = torch.softmax(self.queries(normed) @ self.split(keys).transpose(-1, -2) + bias, dim=-1)
        return self.finish(x, attention @ self.split(values))

    def attend_and_itself(self, x: Tensor, normed: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """The next tokens (B, C, D) of candidates: each attends to keys (B, T, A) and to itself, never to another.

        `bias` (B, H, 1, T) masks the padding of the history.
        """
        q = self.queries(normed)
        k, v = (self.split(own) for own in self.keys_values(normed))
        itself = (q * k).sum(-1, keepdim=True) + self.bias.itself()
        logits = torch.cat([q @ self.split(keys).transpose(-1, -2) + bias, itself], dim=-1)
        attention = torch.softmax(logits, dim=-1)
        return self.finish(x, attention[..., :-1] @ self.split(values) + attention[..., -1:] * v)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows attention (B, H, Q, A / H): projection, residual, feed-forward."""
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        result: Tensor = x + self.dropout(self.ffn(x))
        return result

    def split(self, x: Tensor) -> Tensor:
        """(B, T, A) -> (B, H, T, A / H)."""
        heads: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return heads


class GatingFusion(nn.Module):
    """Bit-wise gating fusion of the blocks' outputs: attention over blocks, then Y = G * sigmoid(f_gate(G)).

    f_gate is a squeeze-and-excitation module over all N * D channels.
    """

    def __init__(self, width: int, blocks: int, shape: FusionShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * shape.heads * shape.head_width)
        self.out = nn.Linear(shape.heads * shape.head_width, width)
        channels = blocks * width
        self.gate = nn.Sequential(nn.Linear(channels, shape.gate), nn.ReLU(), nn.Linear(shape.gate, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N, D) -> (B, C, N * D)."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(2, 3) for part in self.qkv(self.norm(x)).chunk(3, -1))
        attention = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        fused = (x + self.out((attention @ v).transpose(2, 3).flatten(3))).flatten(2)
        gated: Tensor = fused * torch.sigmoid(self.gate(fused))
        return gated


class Climber(BlockRanker):
    """The whole ranker. Options: width D, heads H, layers L of a block, ffn_ratio, hidden (of the heads), dropouts.

    `direct` adds a small network over the candidates' numeric features to the logits (not in the paper): what is known
    of a candidate outright, such as how often it was bought, need not find its way through the transformer.
    While training, the transformer's logits are left out of a share `deep_dropout` of the requests, so that the direct
    network is good by itself and the transformer learns what it adds.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        width: int = 64,
        heads: int = 4,
        layers: int = 2,
        ffn_ratio: int = 4,
        hidden: int = 128,
        dropout: float = 0.1,
        item_dropout: float = 0.1,
        direct: bool = True,
        deep_dropout: float = 0.0,
        shape: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        count = schema.num_sub_sequences
        if shape is None:
            even = even_layers(width, heads, layers, ffn_ratio)
            self.shape = ClimberShape((even,) * count, even_fusion(width, heads, count))
        else:
            self.shape = climber_shape(shape, count)
        self.tokens = TokenEmbedding(schema, width, item_dropout)
        sizes = self.shape.state_layers, self.shape.state_width, self.shape.repeats
        self.blocks = nn.ModuleList(
            Block((Layer(width, layer, schema.history_length, dropout) for layer in stack), *sizes)
            for stack in self.shape.blocks
        )
        self.history_norm = nn.LayerNorm(width)
        self.candidate_norm = nn.LayerNorm(width)
        self.fusion = GatingFusion(width, count, self.shape.fusion)
        channels, tasks = width * count, len(schema.tasks)
        self.head = ranking_head(channels, hidden, tasks, dropout)
        self.deep_dropout = deep_dropout
        self.direct = direct_network(schema.candidate_numeric, hidden, tasks) if direct else None

    def joined(self, outputs: list[Tensor]) -> Tensor:
        """The fusion of the blocks' outputs."""
        fused: Tensor = self.fusion(torch.stack(outputs, 2))
        return fused
