"""The Climber ranker (arXiv 2502.09888): multi-scale extraction, adaptive transformer blocks, bit-wise gating fusion.

In: N sub-sequences of the user's history, C candidates. Out: logits (B, C, K). The structure follows the paper's
description; sizes and initialisation are ours.

A history token sees the history before it; a candidate sees the whole history of its block and itself, never another
candidate. So the state (keys and values of each block and layer) does not depend on the candidates, and a longer
history only adds to it. Keys and values are kept a row a token, as the products make them: no copy turns them over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rankd.features.schema import FeatureSchema
from rankd.models.layer_shapes import ClimberShape, FusionShape, LayerShape, climber_shape, even_fusion, even_layers
from rankd.models.projection import Projection
from rankd.models.protocol import Tensors
from rankd.models.tokens import TokenEmbedding

TIME_BUCKETS = 48
MASKED = -1e4  # survives bfloat16 and float16; exp() of it is 0


class RelativeBias(nn.Module):
    """A learned bias for each head from the distance in positions and in time between a query and a key.

    Time differences fall into half-octave buckets of minutes: bucket = floor(2 log2(1 + minutes)). Position and time
    are looked up together: `pairs` numbers each pair of them once a block, `forward` is one gather a layer.
    """

    def __init__(self, heads: int, positions: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(positions + 1, heads))
        self.time = nn.Parameter(torch.zeros(TIME_BUCKETS, heads))

    def forward(self, pair: Tensor) -> Tensor:
        """Bias (B, H, Q, T) of the pairs (B, Q, T)."""
        both = (self.position[:, None] + self.time).flatten(0, 1).t()  # (H, pairs); a constant once exported
        table = torch.cat([both, torch.full_like(both[:, :1], MASKED)], 1)
        picked: Tensor = torch.index_select(table, 1, pair.flatten()).unflatten(1, pair.shape).transpose(0, 1)
        return picked

    def itself(self) -> Tensor:
        """Bias (H, 1, 1) between a token and itself: no distance in either sense."""
        return (self.position[0] + self.time[0])[:, None, None]


def pairs(distance: Tensor, seconds: Tensor, positions: int) -> Tensor:
    """A number (B, Q, T) int32 for each pair of a distance in tokens and one in seconds; a negative distance is masked.

    >>> distance 2 and time bucket 5 -> 2 x 48 + 5; distance -1 -> (positions + 1) x 48, the entry of the mask
    """
    pair = distance.clamp(0, positions) * TIME_BUCKETS + time_bucket(seconds)
    return torch.where(distance >= 0, pair, (positions + 1) * TIME_BUCKETS).int()


def time_bucket(seconds: Tensor) -> Tensor:
    """Half-octave bucket, 0..TIME_BUCKETS-1, of a non-negative time difference in seconds.

    Half a second is added: whole minutes lie on the edges of buckets, where logarithms of different libraries disagree.
    """
    minutes = (seconds.clamp(min=0).float() + 0.5) / 60.0
    return (2.0 * torch.log2(1.0 + minutes)).floor().clamp(0, TIME_BUCKETS - 1).int()


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


class BlockLayer(Protocol):
    """What a block asks of its layers: `Layer` here, and that of `models.hstu`."""

    attention_width: int
    bias: RelativeBias

    def normed(self, x: Tensor) -> Tensor: ...

    def keys_values(self, normed: Tensor) -> tuple[Tensor, Tensor]: ...

    def attend(self, x: Tensor, normed: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor: ...

    def attend_and_itself(self, x: Tensor, normed: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor: ...


class Block(nn.Module):
    """The layers over one sub-sequence. Blocks do not see each other before the fusion.

    Their states are stacked: one with fewer or narrower layers than the deepest and the widest is padded with zeros.
    """

    def __init__(self, layers: Iterable[nn.Module], state_layers: int, state_width: int, repeats: int = 1) -> None:
        super().__init__()
        self.stack = nn.ModuleList(layers)
        self.repeats, self.state_layers, self.state_width = repeats, state_layers, state_width

    @property
    def layers(self) -> list[BlockLayer]:
        """The layers as tokens pass them, the first one first; a shared one stands there several times."""
        return [layer for layer in cast(list[BlockLayer], list(self.stack)) for _ in range(self.repeats)]

    @property
    def positions(self) -> int:
        """The largest distance in tokens that the bias tells apart."""
        return self.layers[0].bias.position.shape[0] - 1

    def encode(self, x: Tensor, times: Tensor) -> Tensor:
        """Keys and values (B, L, 2, T, A) of tokens (B, T, D); the last layer's tokens are needed by nobody."""
        index = torch.arange(times.shape[-1], device=times.device)
        pair = pairs((index[:, None] - index)[None], times[:, :, None] - times[:, None, :], self.positions)
        made: list[Tensor] = []
        layers = self.layers
        for depth, layer in enumerate(layers):
            normed = layer.normed(x)
            keys, values = layer.keys_values(normed)
            made += self._as_wide(keys, values)
            if depth < len(layers) - 1:
                x = layer.attend(x, normed, keys, values, layer.bias(pair))
        return self._stacked(made)

    def extend(self, x: Tensor, times: Tensor, known: Tensor, known_times: Tensor, length: Tensor) -> Tensor:
        """Keys and values (B, L, 2, E, A) of new tokens x (B, E, D) that follow a history.

        known (B, L, 2, T, A) and known_times (B, T) are the history's, of which `length` (B,) tokens are real.
        """
        new = torch.arange(times.shape[-1], device=times.device)
        old = torch.arange(known_times.shape[-1], device=times.device)
        place = length[:, None, None]
        distance = torch.where(old < place, place + new[:, None] - old, -1)  # (B, E, T)
        before = pairs(distance, times[:, :, None] - known_times[:, None, :], self.positions)
        among = pairs((new[:, None] - new)[None], times[:, :, None] - times[:, None, :], self.positions)
        made: list[Tensor] = []
        layers = self.layers
        for depth, layer in enumerate(layers):
            normed = layer.normed(x)
            keys, values = layer.keys_values(normed)
            made += self._as_wide(keys, values)
            if depth < len(layers) - 1:
                bias = torch.cat([layer.bias(before), layer.bias(among)], -1)
                known_keys, known_values = self._known(known, depth, layer)
                all_keys, all_values = torch.cat([known_keys, keys], 1), torch.cat([known_values, values], 1)
                x = layer.attend(x, normed, all_keys, all_values, bias)
        return self._stacked(made)

    def candidates(self, x: Tensor, known: Tensor, seconds: Tensor, length: Tensor) -> Tensor:
        """Outputs (B, C, D) of candidates (B, C, D): each sees the history and itself.

        known (B, L, 2, T, A) keys and values; seconds (B, T) from each event to now; length (B,) real events.
        """
        index = torch.arange(seconds.shape[-1], device=seconds.device)
        distance = length[:, None] - index  # a candidate stands right after the history
        pair = pairs(torch.where(distance > 0, distance, -1), seconds, self.positions)[:, None]
        for depth, layer in enumerate(self.layers):
            keys, values = self._known(known, depth, layer)
            x = layer.attend_and_itself(x, layer.normed(x), keys, values, layer.bias(pair))
        return x

    def _as_wide(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, T, A) as wide as the state."""
        lacking = self.state_width - keys.shape[-1]
        return (pad(keys, (0, lacking)), pad(values, (0, lacking))) if lacking else (keys, values)

    def _stacked(self, made: list[Tensor]) -> Tensor:
        """The state (B, L, 2, T, A) of the layers' keys and values in turn; layers that this block lacks are zeros."""
        made = made + [torch.zeros_like(made[0])] * (2 * self.state_layers - len(made))
        stacked: Tensor = torch.stack(made, 1).unflatten(1, (-1, 2))
        return stacked

    def _known(self, known: Tensor, depth: int, layer: BlockLayer) -> tuple[Tensor, Tensor]:
        """A layer's keys and values (B, T, A) of the state."""
        keys, values = known[:, depth, 0], known[:, depth, 1]
        width = layer.attention_width
        return (keys, values) if width == self.state_width else (keys[..., :width], values[..., :width])


class BlockRanker(nn.Module):
    """What the Climber and HSTU have in common: a block for each sub-sequence, a head, and a direct network or none.

    A model of this kind sets the parts that stand here by their names, and says how its blocks' outputs are joined.
    """

    tokens: TokenEmbedding
    blocks: nn.ModuleList
    history_norm: nn.LayerNorm
    candidate_norm: nn.LayerNorm
    head: nn.Sequential
    direct: nn.Sequential | None
    deep_dropout: float

    def joined(self, outputs: list[Tensor]) -> Tensor:
        """What the head reads, (B, C, N * D), of the blocks' outputs (B, C, D)."""
        raise NotImplementedError

    def encode(self, history: Tensors) -> dict[str, Tensor]:
        """State: keys_values (B, N, L, 2, T, A), and the times and lengths that the candidates' bias needs."""
        tokens = self.history_norm(self.tokens.events(history))
        times = history["history_time"]
        made = [block.encode(tokens[:, n], times[:, n]) for n, block in enumerate(self._blocks())]
        return {"keys_values": torch.stack(made, 1), "times": times, "lengths": history["history_length"]}

    def extend(self, state: Tensors, new: Tensors) -> dict[str, Tensor]:
        """What E new events a block add to a state: keys_values (B, N, L, 2, E, A), times (B, N, E), new lengths."""
        tokens = self.history_norm(self.tokens.events(new))
        times, lengths = new["history_time"], state["lengths"]
        made = [
            block.extend(tokens[:, n], times[:, n], state["keys_values"][:, n], state["times"][:, n], lengths[:, n])
            for n, block in enumerate(self._blocks())
        ]
        return {"keys_values": torch.stack(made, 1), "times": times, "lengths": lengths + new["history_length"]}

    def score(self, state: Tensors, candidates: Tensors) -> Tensor:
        """Logits (B, C, K)."""
        tokens = self.candidate_norm(self.tokens.candidates(candidates))
        seconds = candidates["context_time"][:, None, None] - state["times"]
        known, lengths = state["keys_values"], state["lengths"]
        outputs = [
            block.candidates(tokens, known[:, n], seconds[:, n], lengths[:, n])
            for n, block in enumerate(self._blocks())
        ]
        logits: Tensor = self.head(self.joined(outputs))
        if self.direct is None:
            return logits
        if self.training and self.deep_dropout > 0:
            kept = torch.rand(logits.shape[0], 1, 1, device=logits.device) >= self.deep_dropout
            logits = logits * kept
        direct: Tensor = self.direct(candidates["candidate_numeric"])
        return logits + direct

    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))


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


def ranking_head(channels: int, hidden: int, tasks: int, dropout: float) -> nn.Sequential:
    """Logits of K tasks from what the blocks have made of a candidate."""
    return nn.Sequential(
        nn.LayerNorm(channels),
        nn.Linear(channels, hidden),
        nn.SiLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, tasks),
    )


def direct_network(inputs: int, hidden: int, tasks: int) -> nn.Sequential | None:
    """Logits of K tasks from a candidate's numbers alone; None where it has none."""
    if not inputs:
        return None
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, tasks)
    )
