"""The Climber ranker (arXiv 2502.09888): multi-scale extraction, adaptive transformer blocks, bit-wise gating fusion.

In: N sub-sequences of the user's history, C candidates. Out: logits (B, C, K). The structure follows the paper's
description; sizes and initialisation are ours.

A history token sees the history before it; a candidate sees the whole history of its block and itself, never another
candidate. So the state (keys and values of each block and layer) does not depend on the candidates.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from rankd.features.schema import FeatureSchema
from rankd.models.protocol import Tensors
from rankd.models.tokens import TokenEmbedding

TIME_BUCKETS = 48
MASKED = -1e4  # survives bfloat16 and float16; exp() of it is 0


class RelativeBias(nn.Module):
    """A learned bias for each head from the distance in positions and in time between a query and a key.

    Time differences fall into half-octave buckets of minutes: bucket = floor(2 log2(1 + minutes)).
    """

    def __init__(self, heads: int, positions: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(positions + 1, heads))
        self.time = nn.Parameter(torch.zeros(TIME_BUCKETS, heads))

    def forward(self, distance: Tensor, seconds: Tensor) -> Tensor:
        """distance (..., Q, T) and seconds (..., Q, T) integers -> (..., H, Q, T)."""
        return self.of_position(distance) + self.of_time(time_bucket(seconds))

    def of_position(self, distance: Tensor) -> Tensor:
        """Bias (..., H, Q, T) of a distance in tokens, clipped to the table."""
        picked = self.position[distance.clamp(0, self.position.shape[0] - 1)]
        return picked.movedim(-1, -3)

    def of_time(self, bucket: Tensor) -> Tensor:
        """Bias (..., H, Q, T) of a time bucket."""
        return self.time[bucket].movedim(-1, -3)


def time_bucket(seconds: Tensor) -> Tensor:
    """Half-octave bucket, 0..TIME_BUCKETS-1, of a non-negative time difference in seconds."""
    minutes = seconds.clamp(min=0).float() / 60.0
    return (2.0 * torch.log2(1.0 + minutes)).floor().clamp(0, TIME_BUCKETS - 1).long()


class Layer(nn.Module):
    """One pre-norm transformer layer: attention with relative bias and learned temperature, then feed-forward."""

    def __init__(self, width: int, heads: int, ffn_ratio: int, positions: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.bias = RelativeBias(heads, positions)
        # Takes the place of sqrt(D / H); one for each block, layer and head.
        self.log_temperature = nn.Parameter(torch.full((heads,), 0.5 * math.log(width // heads)))
        self.ffn = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, ffn_ratio * width), nn.GELU(), nn.Linear(ffn_ratio * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (already over the temperature), keys and values (B, H, T, D / H) of tokens (B, T, D)."""
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return self._split(q) / self._temperature(), self._split(k), self._split(v)

    def history(self, x: Tensor, qkv: tuple[Tensor, Tensor, Tensor], bias: Tensor) -> Tensor:
        """The history's next tokens (B, T, D); `bias` (B, H, T, T) holds the causal mask."""
        q, k, v = qkv
        attention = torch.softmax(q @ k.transpose(-1, -2) + bias, dim=-1)
        return self._finish(x, attention @ v)

    def candidates(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """The candidates' next tokens (B, C, D): each attends to the keys (B, H, T, D / H) and to itself.

        `bias` (B, H, 1, T) masks the padding of the history; a candidate's distance to itself is 0 in both senses.
        """
        q, k, v = self.keys_values(x)
        itself = (q * k).sum(-1, keepdim=True) + (self.bias.position[0] + self.bias.time[0])[:, None, None]
        logits = torch.cat([q @ keys.transpose(-1, -2) + bias, itself], dim=-1)
        attention = torch.softmax(logits, dim=-1)
        return self._finish(x, attention[..., :-1] @ values + attention[..., -1:] * v)

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        result: Tensor = x + self.dropout(self.ffn(x))
        return result

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return heads

    def _temperature(self) -> Tensor:
        return self.log_temperature.exp()[:, None, None]


class GatingFusion(nn.Module):
    """Bit-wise gating fusion of the blocks' outputs: attention over blocks, then Y = G * sigmoid(f_gate(G)).

    f_gate is a squeeze-and-excitation module over all N * D channels.
    """

    def __init__(self, width: int, heads: int, blocks: int, reduction: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        channels = blocks * width
        self.gate = nn.Sequential(
            nn.Linear(channels, channels // reduction), nn.ReLU(), nn.Linear(channels // reduction, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N, D) -> (B, C, N * D)."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(2, 3) for part in self.qkv(self.norm(x)).chunk(3, -1))
        attention = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        fused = (x + self.out((attention @ v).transpose(2, 3).flatten(3))).flatten(2)
        gated: Tensor = fused * torch.sigmoid(self.gate(fused))
        return gated


class Block(nn.Module):
    """The layers over one sub-sequence. Blocks are alike and do not see each other before the fusion."""

    def __init__(self, layers: int, width: int, heads: int, ffn_ratio: int, positions: int, dropout: float) -> None:
        super().__init__()
        self.stack = nn.ModuleList(Layer(width, heads, ffn_ratio, positions, dropout) for _ in range(layers))

    @property
    def layers(self) -> list[Layer]:
        """The layers, the first one first."""
        return cast(list[Layer], list(self.stack))

    def encode(self, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, L, H, T, D / H) of tokens (B, T, D); the last layer's tokens are needed by nobody."""
        index = torch.arange(times.shape[-1], device=times.device)
        distance = index[:, None] - index
        mask = torch.where(distance >= 0, 0.0, MASKED)
        bucket = time_bucket(times[:, :, None] - times[:, None, :])
        keys, values = [], []
        for depth, layer in enumerate(self.layers):
            qkv = layer.keys_values(x)
            keys.append(qkv[1])
            values.append(qkv[2])
            if depth < len(self.stack) - 1:
                x = layer.history(x, qkv, layer.bias.of_position(distance) + layer.bias.of_time(bucket) + mask)
        return torch.stack(keys, 1), torch.stack(values, 1)

    def candidates(self, x: Tensor, keys: Tensor, values: Tensor, seconds: Tensor, length: Tensor) -> Tensor:
        """Outputs (B, C, D) of candidates (B, C, D): each sees the history and itself.

        keys, values (B, L, H, T, D / H); seconds (B, T) from each event to now; length (B,) real events.
        """
        index = torch.arange(seconds.shape[-1], device=seconds.device)
        distance = (length[:, None] - index)[:, None]  # (B, 1, T): a candidate stands right after the history
        mask = torch.where(distance > 0, 0.0, MASKED)[:, None]
        bucket = time_bucket(seconds)[:, None]
        for depth, layer in enumerate(self.layers):
            bias = layer.bias.of_position(distance) + layer.bias.of_time(bucket) + mask
            x = layer.candidates(x, keys[:, depth], values[:, depth], bias)
        return x


class Climber(nn.Module):
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
    ) -> None:
        super().__init__()
        self.tokens = TokenEmbedding(schema, width, item_dropout)
        self.blocks = nn.ModuleList(
            Block(layers, width, heads, ffn_ratio, schema.history_length, dropout) for _ in schema.sub_sequences
        )
        self.history_norm = nn.LayerNorm(width)
        self.candidate_norm = nn.LayerNorm(width)
        self.fusion = GatingFusion(width, heads, schema.num_sub_sequences)
        channels, tasks = width * schema.num_sub_sequences, len(schema.tasks)
        self.head = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, hidden),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, tasks),
        )
        self.deep_dropout = deep_dropout
        self.direct = _direct(schema.candidate_numeric, hidden, tasks) if direct and schema.candidate_numeric else None

    def encode(self, history: Tensors) -> dict[str, Tensor]:
        """State: keys, values (B, N, L, H, T, D / H), and the times and lengths that the candidates' bias needs."""
        tokens = self.history_norm(self.tokens.events(history))
        times = history["history_time"]
        encoded = [block.encode(tokens[:, n], times[:, n]) for n, block in enumerate(self._blocks())]
        return {
            "keys": torch.stack([keys for keys, _ in encoded], 1),
            "values": torch.stack([values for _, values in encoded], 1),
            "times": times,
            "lengths": history["history_length"],
        }

    def score(self, state: Tensors, candidates: Tensors) -> Tensor:
        """Logits (B, C, K)."""
        tokens = self.candidate_norm(self.tokens.candidates(candidates))
        seconds = candidates["context_time"][:, None, None] - state["times"]
        keys, values, lengths = state["keys"], state["values"], state["lengths"]
        outputs = [
            block.candidates(tokens, keys[:, n], values[:, n], seconds[:, n], lengths[:, n])
            for n, block in enumerate(self._blocks())
        ]
        logits: Tensor = self.head(self.fusion(torch.stack(outputs, 2)))
        if self.direct is None:
            return logits
        if self.training and self.deep_dropout > 0:
            kept = torch.rand(logits.shape[0], 1, 1, device=logits.device) >= self.deep_dropout
            logits = logits * kept
        direct: Tensor = self.direct(candidates["candidate_numeric"])
        return logits + direct

    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))


def _direct(inputs: int, hidden: int, tasks: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, tasks)
    )
