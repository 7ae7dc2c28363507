"""Blocks of transformer layers over sub-sequences of a history, which rankers have in common: the Climber and HSTU.

In: N sub-sequences of the user's history, C candidates. Out: what a head makes logits (B, C, K) of. The layers of a
block are a ranker's own (`BlockLayer`); how the blocks' outputs are joined, too.

A history token sees the history before it; a candidate sees the whole history of its block and itself, never another
candidate. So the state (keys and values of each block and layer) does not depend on the candidates, and a longer
history only adds to it. Keys and values are kept a row a token, as the products make them: no copy turns them over.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rankd.models.protocol import Tensors
from rankd.models.tokens import TokenRanker

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


class BlockLayer(Protocol):
    """What a block asks of its layers: those of `climber.py` and of `hstu.py`."""

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


class BlockRanker(TokenRanker):
    """What the Climber and HSTU have in common: a block for each sub-sequence, a head, and a direct network or none.

    A model of this kind sets the parts that stand here by their names, and says how its blocks' outputs are joined.
    """

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
