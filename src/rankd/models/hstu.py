"""HSTU (arXiv 2402.17152, "Actions Speak Louder than Words") as a ranker: attention without softmax, gates instead of a
feed-forward network.

In: N sub-sequences of the user's history, C candidates. Out: logits (B, C, K). It runs in the Climber's blocks, with
its relative bias of position and time, its mask and its state: history is causal, a candidate sees the history and
itself. The outputs of the blocks lie side by side before the head; with one sub-sequence it is the paper's model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from rankd.features.schema import FeatureSchema
from rankd.models.blocks import Block, BlockRanker, RelativeBias, direct_network, ranking_head
from rankd.models.layer_shapes import HstuForm
from rankd.models.projection import Projection
from rankd.models.tokens import TokenEmbedding

EPSILON = 1e-6


class HstuLayer(nn.Module):
    """One layer: x' = x + f2(U * norm(a)), a = SiLU(Q K^T + bias) V / n, and U, Q, K, V from one projection of norm(x).

    n is the longest history that the model takes, whatever this user's is: a constant. The number of tokens in a call
    would depend on padding and on how many candidates come together, and the user's own length on when a token came: no
    score could be cut or packed, and no state extended. (The paper's code divides by the length that it pads to.)

    HstuForm.PAPER: U, Q, K and V all pass SiLU. HstuForm.DLRM_V3, as in MLPerf: U alone does, Q K^T is divided by
    sqrt(D / H), and f2 reads U, a and U * norm(a) side by side.
    """

    def __init__(self, width: int, heads: int, positions: int, form: HstuForm, dropout: float) -> None:
        super().__init__()
        self.heads, self.attention_width, self.longest, self.form = heads, width, positions, form
        self.norm = nn.LayerNorm(width, EPSILON)
        self.uqkv = Projection(width, 4 * width)
        self.bias = RelativeBias(heads, positions)
        self.attended_norm = nn.LayerNorm(width, EPSILON)
        self.out = nn.Linear(form.output_parts * width, width)
        self.dropout = nn.Dropout(dropout)

    def normed(self, x: Tensor) -> Tensor:
        """What U, Q, K and V are made of, from tokens (B, T, D)."""
        normed: Tensor = self.norm(x)
        return normed

    def gates(self, normed: Tensor) -> Tensor:
        """U (B, Q, D)."""
        return silu(self._part(normed, 0))

    def queries(self, normed: Tensor) -> Tensor:
        """Q (B, H, Q, D / H)."""
        queries = self._activated(self._part(normed, 1))
        if self.form is HstuForm.DLRM_V3:
            queries = queries * (self.heads / self.attention_width) ** 0.5
        return self.split(queries)

    def keys_values(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """K and V (B, T, D)."""
        return self._activated(self._part(normed, 2)), self._activated(self._part(normed, 3))

    def attend(self, x: Tensor, normed: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """The next tokens (B, Q, D) of x; keys and values (B, T, D), bias (B, H, Q, T) with the mask in it.

        SiLU of what is masked is 0 to the bit: the mask is far below the exponent's range.
        """
        attention = silu(self.queries(normed) @ self.split(keys).transpose(-1, -2) + bias)
        return self.finish(x, normed, attention @ self.split(values))

    def attend_and_itself(self, x: Tensor, normed: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """The next tokens (B, C, D) of candidates: each attends to keys (B, T, D) and to itself, never to another.

        `bias` (B, H, 1, T) masks the padding of the history.
        """
        q = self.queries(normed)
        k, v = (self.split(own) for own in self.keys_values(normed))
        itself = silu((q * k).sum(-1, keepdim=True) + self.bias.itself())
        attention = silu(q @ self.split(keys).transpose(-1, -2) + bias)
        return self.finish(x, normed, attention @ self.split(values) + itself * v)

    def finish(self, x: Tensor, normed: Tensor, attended: Tensor) -> Tensor:
        """What follows attention (B, H, Q, D / H): its length, norm, gates, projection, residual."""
        attended, gates = attended.transpose(1, 2).flatten(2) / self.longest, self.gates(normed)
        gated = gates * self.attended_norm(attended)
        if self.form is HstuForm.DLRM_V3:
            gated = torch.cat([gates, attended, gated], -1)
        result: Tensor = x + self.out(self.dropout(gated))
        return result

    def split(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, D / H)."""
        heads: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return heads

    def _part(self, normed: Tensor, number: int) -> Tensor:
        """One of the four D outputs of the projection, in the order U, Q, K, V."""
        return self.uqkv.rows(normed, slice(number * self.attention_width, (number + 1) * self.attention_width))

    def _activated(self, x: Tensor) -> Tensor:
        return silu(x) if self.form is HstuForm.PAPER else x


class Hstu(BlockRanker):
    """The whole ranker. Options: width D, heads H, layers L of a block, hidden (of the head), dropouts, form.

    Queries, keys, values and gates are D / H wide a head. `direct` and `deep_dropout` are the Climber's; neither they
    nor the features that tokens are made of are the paper's.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        width: int = 64,
        heads: int = 4,
        layers: int = 4,
        hidden: int = 128,
        form: str = "paper",
        dropout: float = 0.1,
        item_dropout: float = 0.1,
        direct: bool = True,
        deep_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        kinds = [one.value for one in HstuForm]
        if form not in kinds:
            raise TypeError(f"form is '{form}'; it has to be one of {', '.join(kinds)}")
        if heads < 1 or layers < 1 or width % heads:
            raise TypeError(f"width {width} has to be a multiple of heads {heads}, with at least one head and layer")
        count, positions = schema.num_sub_sequences, schema.history_length
        self.tokens = TokenEmbedding(schema, width, item_dropout)
        self.blocks = nn.ModuleList(
            Block((HstuLayer(width, heads, positions, HstuForm(form), dropout) for _ in range(layers)), layers, width)
            for _ in range(count)
        )
        self.history_norm = nn.LayerNorm(width)
        self.candidate_norm = nn.LayerNorm(width)
        self.head = ranking_head(width * count, hidden, len(schema.tasks), dropout)
        self.deep_dropout = deep_dropout
        self.direct = direct_network(schema.candidate_numeric, hidden, len(schema.tasks)) if direct else None

    def joined(self, outputs: list[Tensor]) -> Tensor:
        """The blocks' outputs side by side."""
        return torch.cat(outputs, -1)
