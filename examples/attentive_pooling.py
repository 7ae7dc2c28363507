"""A ranker of your own, outside the package: DIN-style attentive pooling (Zhou et al. 2018), in one file.

It has no state that could be kept for a user, so it is a plain `forward(history, candidates)`; rankd trains, builds and
serves it all the same:

    # recipe.toml
    [model]
    kind = "examples/attentive_pooling.py:AttentivePooling"
    options = { width = 32 }
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rankd.features.schema import FeatureSchema


class AttentivePooling(nn.Module):
    """Each candidate weighs the events of the history by a small network and reads their weighted mean."""

    def __init__(self, schema: FeatureSchema, width: int = 32) -> None:
        super().__init__()
        self.item = nn.Embedding(schema.num_item_rows, width, padding_idx=0)
        self.numeric = nn.Linear(max(schema.candidate_numeric, 1), width)
        self.weigh = nn.Sequential(nn.Linear(3 * width, width), nn.SiLU(), nn.Linear(width, 1))
        self.head = nn.Sequential(nn.Linear(3 * width, width), nn.SiLU(), nn.Linear(width, len(schema.tasks)))

    def forward(self, history: Mapping[str, Tensor], candidates: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, C, K); see `rankd.features.schema` for what the two dicts hold."""
        events = self.item(history["history_item"][:, 0])  # (B, T, D) of the first sub-sequence
        items = self.item(candidates["candidate_item"])  # (B, C, D)
        numeric = self.numeric(candidates["candidate_numeric"])
        pairs = torch.broadcast_tensors(items[:, :, None], events[:, None])
        weights = self.weigh(torch.cat([*pairs, pairs[0] * pairs[1]], -1))  # (B, C, T, 1)
        length = history["history_length"][:, :1]
        real = torch.arange(events.shape[1]) < length  # (B, T)
        # Over the real events and not over T, which padding changes.
        pooled = (weights * real[:, None, :, None] * pairs[1]).sum(2) / length.clamp(min=1)[:, None]
        logits: Tensor = self.head(torch.cat([items, pooled, numeric], -1))
        return logits
