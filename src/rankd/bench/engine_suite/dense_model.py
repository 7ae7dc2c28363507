"""Climber and HSTU as their papers draw them: history and candidates in one sequence under one dense mask.

It computes what `models.climber` and `models.hstu` compute, with the same weights and parts, as somebody would who
writes the model down and serves it as it is: every token meets every token, and the mask takes most of it back. The
baseline of `rankd bench engine`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from rankd.errors import EngineFailure
from rankd.models.blocks import Block, BlockRanker, pairs
from rankd.models.protocol import Tensors


class DenseRanker(nn.Module):
    """A Climber or an HSTU in one pass: `forward(history, candidates) -> logits (B, C, K)`."""

    def __init__(self, model: BlockRanker) -> None:
        super().__init__()
        self.model = model

    def forward(self, history: Tensors, candidates: Tensors) -> Tensor:
        """Logits (B, C, K) float32."""
        model = self.model
        events = model.history_norm(model.tokens.events(history))
        items = model.candidate_norm(model.tokens.candidates(candidates))
        count = items.shape[1]
        outputs = []
        for n, block in enumerate(model.blocks):
            times = history["history_time"][:, n]
            now = candidates["context_time"][:, None].expand(-1, count)
            stack = cast(Block, block)
            pair = dense_pairs(times, now, history["history_length"][:, n], stack.positions)
            x = torch.cat([events[:, n], items], 1)
            for layer in stack.layers:
                normed = layer.normed(x)
                x = layer.attend(x, normed, *layer.keys_values(normed), layer.bias(pair))
            outputs.append(x[:, -count:])
        logits: Tensor = model.head(model.joined(outputs))
        return logits if model.direct is None else logits + model.direct(candidates["candidate_numeric"])


def dense_form(model: nn.Module) -> DenseRanker:
    """The dense form of a ranker that is made of blocks.

    Raises:
        EngineFailure: a model of another kind.
    """
    if not isinstance(model, BlockRanker):
        raise EngineFailure(f"climber and hstu have a dense form here, a {type(model).__name__} has none")
    return DenseRanker(model)


def dense_pairs(times: Tensor, now: Tensor, length: Tensor, positions: int) -> Tensor:
    """The number (B, S, S) of each pair of S = T + C tokens in the table of biases, masked pairs included.

    times (B, T), now (B, C), length (B,). Candidates stand right after the history, all at the same place.
    """
    tokens, count = times.shape[1], now.shape[1]
    index = torch.arange(tokens, device=times.device).expand_as(times)
    place = torch.cat([index, length[:, None].expand(-1, count)], 1)
    moment = torch.cat([times, now], 1)
    number = torch.arange(tokens + count, device=times.device)
    real = (number < tokens) & (number < length[:, None])  # (B, S): a key that is an event
    earlier = real[:, None] & (place[:, None, :] < place[:, :, None])
    allowed = earlier | (number[:, None] == number)
    distance = torch.where(allowed, place[:, :, None] - place[:, None], -1)
    return pairs(distance, moment[:, :, None] - moment[:, None], positions)
