"""Climber and HSTU as their papers draw them: history and candidates in one sequence under one dense mask.

It computes what `models.climber` and `models.hstu` compute, with the same weights and parts, as somebody would who
writes the model down and serves it as it is: every token meets every token, and the mask takes most of it back. The
baseline of `rankd bench engine`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from rankd.bench.engine_suite.dense_attention import Attention, DenseTokens, attention_over
from rankd.errors import EngineFailure
from rankd.models.blocks import Block, BlockRanker
from rankd.models.protocol import Tensors


class DenseRanker(nn.Module):
    """A Climber or an HSTU in one pass: `forward(history, candidates) -> logits (B, C, K)`."""

    def __init__(self, model: BlockRanker, attention: Attention = Attention.PLAIN) -> None:
        super().__init__()
        self.model, self.attention = model, attention

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
            tokens = DenseTokens.of(times, now, history["history_length"][:, n], stack.positions)
            attend = attention_over(tokens, self.attention)
            x = torch.cat([events[:, n], items], 1)
            for layer in stack.layers:
                x = attend(layer, x)
            outputs.append(x[:, -count:])
        logits: Tensor = model.head(model.joined(outputs))
        return logits if model.direct is None else logits + model.direct(candidates["candidate_numeric"])


def dense_form(model: nn.Module, attention: Attention = Attention.PLAIN) -> DenseRanker:
    """The dense form of a ranker that is made of blocks.

    Raises:
        EngineFailure: a model of another kind.
    """
    if not isinstance(model, BlockRanker):
        raise EngineFailure(f"climber and hstu have a dense form here, a {type(model).__name__} has none")
    return DenseRanker(model, attention)
