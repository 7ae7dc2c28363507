"""SASRec (Kang and McAuley 2018) as a ranker: a causal transformer over the newest events, one vector for the user.

Its state is one vector (B, D), not keys and values; a candidate's logit is a dot product with it. It reads one
sub-sequence (the first of the schema) and absolute positions counted back from the newest event.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rankd.features.schema import FeatureSchema
from rankd.models.layer_shapes import LayerShape, even_layers, layer_shapes
from rankd.models.projection import Projection
from rankd.models.protocol import Tensors
from rankd.models.tokens import TokenEmbedding, TokenRanker


class SASRec(TokenRanker):
    """Options: width D, heads H, layers L, dropout, item_dropout.

    `shape` gives every layer sizes of its own, as pruning leaves them; it takes the place of heads and layers.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        width: int = 64,
        heads: int = 2,
        layers: int = 2,
        dropout: float = 0.1,
        item_dropout: float = 0.1,
        shape: Sequence[Mapping[str, int]] | None = None,
    ) -> None:
        super().__init__()
        self.shape = even_layers(width, heads, layers, 4) if shape is None else layer_shapes(shape)
        self.tokens = TokenEmbedding(schema, width, item_dropout)
        self.position = nn.Embedding(schema.history_length + 1, width)
        self.layers = nn.ModuleList(_CausalLayer(width, layer, dropout) for layer in self.shape)
        self.norm = nn.LayerNorm(width)
        num_tasks = len(schema.tasks)
        self.project = nn.Linear(width, num_tasks * width)
        self.own = nn.Linear(width, num_tasks)  # what a candidate is worth to anybody

    def encode(self, history: Tensors) -> dict[str, Tensor]:
        """State: user (B, D); zeros for a user without history."""
        length = history["history_length"][:, 0]
        x = self.tokens.events(history)[:, 0]
        index = torch.arange(x.shape[1], device=x.device)
        back = (length[:, None] - index).clamp(0, self.position.num_embeddings - 1)
        x = x + self.position(back)
        mask = torch.where(index[:, None] >= index, 0.0, -1e4)
        for layer in self.layers:
            x = layer(x, mask)
        last = (index == length[:, None] - 1).to(x.dtype)  # (B, T): picks the newest real token, none if there is none
        return {"user": (self.norm(x) * last[..., None]).sum(1)}

    def score(self, state: Tensors, candidates: Tensors) -> Tensor:
        """Logits (B, C, K)."""
        items = self.tokens.candidates(candidates)
        user = self.project(state["user"]).unflatten(-1, (-1, items.shape[-1]))  # (B, K, D)
        logits: Tensor = items @ user.transpose(-1, -2) * items.shape[-1] ** -0.5 + self.own(items)
        return logits


class _CausalLayer(nn.Module):
    def __init__(self, width: int, shape: LayerShape, dropout: float) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm = nn.LayerNorm(width)
        self.qkv = Projection(width, 3 * shape.attention_width, shape.qkv_rank)
        self.out = Projection(shape.attention_width, width, shape.out_rank)
        self.ffn = nn.Sequential(
            nn.LayerNorm(width),
            Projection(width, shape.ffn, shape.up_rank),
            nn.GELU(),
            Projection(shape.ffn, width, shape.down_rank),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in self.qkv(self.norm(x)).chunk(3, -1))
        attention = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask, dim=-1)
        x = x + self.dropout(self.out((attention @ v).transpose(1, 2).flatten(2)))
        result: Tensor = x + self.dropout(self.ffn(x))
        return result
