"""Embeddings of history events and of candidates, shared by the built-in rankers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankd.features.schema import PADDING_ROW, UNKNOWN_ROW, FeatureSchema
from rankd.models.protocol import Tensors


class TokenEmbedding(nn.Module):
    """Events and candidates as vectors of width D in one space: item + categories (+ event, values | numeric, user).

    While training, a share `item_dropout` of the items is shown as the unknown item, so that the unknown item's row
    becomes a fair description of an item of which only its features are known.
    """

    def __init__(self, schema: FeatureSchema, width: int, item_dropout: float) -> None:
        super().__init__()
        self.item_dropout = item_dropout
        self.item = nn.Embedding(schema.num_item_rows, width, padding_idx=PADDING_ROW)
        self.categories = nn.Embedding(schema.num_item_codes, width, padding_idx=0) if schema.item_columns else None
        self.event = nn.Embedding(len(schema.event_types), width)
        self.values = nn.Linear(len(schema.event_values), width, bias=False) if schema.event_values else None
        self.numeric = _dense(schema.candidate_numeric, width) if schema.candidate_numeric else None
        self.user_categories = (
            nn.Embedding(schema.num_user_codes, width, padding_idx=0) if schema.user_columns else None
        )
        self.user_numeric = nn.Linear(len(schema.user_numeric), width, bias=False) if schema.user_numeric else None
        for table in (self.item, self.categories, self.event, self.user_categories):
            if table is not None:
                nn.init.normal_(table.weight, std=width**-0.5)
                if table.padding_idx is not None:
                    nn.init.zeros_(table.weight[table.padding_idx])

    def events(self, history: Tensors) -> Tensor:
        """(B, N, T, D) from the history inputs."""
        tokens: Tensor = self._items(history["history_item"]) + self.event(history["history_event"])
        if self.categories is not None:
            tokens = tokens + self.categories(history["history_categories"]).sum(-2)
        if self.values is not None:
            tokens = tokens + self.values(history["history_values"])
        return tokens

    def candidates(self, candidates: Tensors) -> Tensor:
        """(B, C, D) from the candidate and context inputs."""
        tokens = self._items(candidates["candidate_item"])
        if self.categories is not None:
            tokens = tokens + self.categories(candidates["candidate_categories"]).sum(-2)
        if self.numeric is not None:
            tokens = tokens + self.numeric(candidates["candidate_numeric"])
        if self.user_categories is not None:
            tokens = tokens + self.user_categories(candidates["context_categories"]).sum(-2).unsqueeze(1)
        if self.user_numeric is not None:
            tokens = tokens + self.user_numeric(candidates["context_numeric"]).unsqueeze(1)
        return tokens

    def share_unseen(self, seen_rows: Tensor) -> None:
        """Give every item row that training never saw the unknown item's vector. seen_rows (I,) bool."""
        share_unknown(self.item, seen_rows)

    def _items(self, rows: Tensor) -> Tensor:
        vectors: Tensor = self.item(hide_items(rows, self.item_dropout) if self.training else rows)
        return vectors


def hide_items(rows: Tensor, share: float) -> Tensor:
    """Rows of items of which a share is shown as the unknown item; padding stays."""
    if share <= 0:
        return rows
    hidden = (torch.rand(rows.shape, device=rows.device) < share) & (rows != PADDING_ROW)
    return torch.where(hidden, torch.full_like(rows, UNKNOWN_ROW), rows)


def share_unknown(items: nn.Embedding, seen_rows: Tensor) -> None:
    """Give every item row that training never saw the unknown item's vector. seen_rows (I,) bool."""
    with torch.no_grad():
        unseen = ~seen_rows
        unseen[: UNKNOWN_ROW + 1] = False
        items.weight[unseen] = items.weight[UNKNOWN_ROW].clone()


def _dense(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))
