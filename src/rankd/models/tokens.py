"""Embeddings of history events and of candidates, shared by the built-in rankers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankd.features.schema import PADDING_ROW, UNKNOWN_ROW, EmbeddedFeature, EmbeddedSide, FeatureSchema
from rankd.models.protocol import Tensors

ITEMS, ITEM_COLUMNS, USER_COLUMNS = "item", "item.columns", "user.columns"
"""Names of the tables that can live beside the graph."""


class TokenEmbedding(nn.Module):
    """Events and candidates as vectors of width D in one space: item + categories (+ event, values | numeric, user).

    While training, a share `item_dropout` of the items is shown as the unknown item, so that the unknown item's row
    becomes a fair description of an item of which only its features are known.

    The tables of items, of their columns and of users' columns can live outside: then `history_embedded`,
    `candidate_embedded` and `context_embedded` have what was looked up in each, D numbers beside D numbers. The table
    of events has a row for each type and stays: a look-up would send more than it saves.
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

    def embedded(self) -> tuple[EmbeddedFeature, ...]:
        """What is looked up of a token and of a candidate, and once for a request."""
        sides = {ITEMS: (EmbeddedSide.ITEM, EmbeddedSide.EVENT_ITEM)}
        if self.categories is not None:
            sides[ITEM_COLUMNS] = (EmbeddedSide.ITEM_COLUMNS, EmbeddedSide.EVENT_COLUMNS)
        width = self.item.embedding_dim
        found = [EmbeddedFeature(table, width, side) for table, both in sides.items() for side in both]
        if self.user_categories is not None:
            found.append(EmbeddedFeature(USER_COLUMNS, width, EmbeddedSide.USER_COLUMNS))
        return tuple(found)

    def tables(self) -> dict[str, Tensor]:
        """(rows, D) by name."""
        tables = {ITEMS: self.item, ITEM_COLUMNS: self.categories, USER_COLUMNS: self.user_categories}
        return {name: table.weight for name, table in tables.items() if table is not None}

    def events(self, history: Tensors) -> Tensor:
        """(B, N, T, D) from the history inputs."""
        tokens: Tensor = self._described(history, "history") + self.event(history["history_event"])
        if self.values is not None:
            tokens = tokens + self.values(history["history_values"])
        return tokens

    def candidates(self, candidates: Tensors) -> Tensor:
        """(B, C, D) from the candidate and context inputs."""
        tokens = self._described(candidates, "candidate")
        if self.numeric is not None:
            tokens = tokens + self.numeric(candidates["candidate_numeric"])
        if self.user_categories is not None:
            looked_up = candidates.get("context_embedded")
            user = self.user_categories(candidates["context_categories"]).sum(-2) if looked_up is None else looked_up
            tokens = tokens + user.unsqueeze(1)
        if self.user_numeric is not None:
            tokens = tokens + self.user_numeric(candidates["context_numeric"]).unsqueeze(1)
        return tokens

    def share_unseen(self, seen_rows: Tensor) -> None:
        """Give every item row that training never saw the unknown item's vector. seen_rows (I,) bool."""
        share_unknown(self.item, seen_rows)

    def _described(self, inputs: Tensors, side: str) -> Tensor:
        """(..., D) of items and their categories: looked up here, or already."""
        looked_up = inputs.get(f"{side}_embedded")
        if looked_up is not None:
            described: Tensor = looked_up.unflatten(-1, (-1, self.item.embedding_dim)).sum(-2)
            return described
        rows = inputs[f"{side}_item"]
        items: Tensor = self.item(hide_items(rows, self.item_dropout) if self.training else rows)
        return items if self.categories is None else items + self.categories(inputs[f"{side}_categories"]).sum(-2)


class TokenRanker(nn.Module):
    """A ranker of such tokens: an `EmbeddedModel`."""

    tokens: TokenEmbedding

    def embedded(self) -> tuple[EmbeddedFeature, ...]:
        """See `TokenEmbedding.embedded`."""
        return self.tokens.embedded()

    def tables(self) -> dict[str, Tensor]:
        """See `TokenEmbedding.tables`."""
        return self.tokens.tables()


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
