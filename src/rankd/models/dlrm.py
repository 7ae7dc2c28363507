"""DLRM (Naumov et al. 2019) and its DCNv2 form (Wang et al. 2020; MLPerf's dlrm-v2): embeddings that are pooled by
summing, a small network over the numbers, and the interaction of the two.

`DlrmNet` is the dense part alone: numbers and pooled embeddings in, logits out. `Dlrm` is a ranker around it, whose
tables are those of a FeatureSchema: items, each categorical column of items and of users, and the items of the user's
history. What is pooled of the history is the state: a sum, so that new events are added to it. Built with its tables
beside the graph, it reads what was pooled (`score_embedded`), and the state is looked up with the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from rankd.features.schema import (
    PADDING_ROW,
    Categorical,
    EmbeddedFeature,
    EmbeddedSide,
    FeatureSchema,
)
from rankd.models.protocol import Tensors
from rankd.models.tokens import hide_items, share_unknown

BOTTOM = (512, 256)
TOP = (1024, 1024, 512, 256)


class LowRankCross(nn.Module):
    """Layers x <- x_0 * (W V x + b) + x over vectors of width N, with V (rank, N) and W (N, rank)."""

    def __init__(self, width: int, layers: int, rank: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(rank, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(..., N) to (..., N)."""
        crossed = x
        for down, up in zip(self.down, self.up, strict=True):
            crossed = x * up(down(crossed)) + crossed
        return crossed


class DotInteraction(nn.Module):
    """The products of each pair of V vectors, behind the first of them."""

    def __init__(self, vectors: int) -> None:
        super().__init__()
        self.register_buffer("pairs", torch.tril_indices(vectors, vectors, -1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., V, D) to (..., D + V (V - 1) / 2)."""
        pairs = self.get_buffer("pairs")
        products = (x @ x.transpose(-1, -2))[..., pairs[0], pairs[1]]
        return torch.cat([x[..., 0, :], products], -1)


class DlrmNet(nn.Module):
    """The dense part. Its defaults are MLPerf's dlrm-v2 for D = 128: a bottom network 512-256-D over the numbers, three
    cross layers of rank 512 over all vectors side by side, and a top network 1024-1024-512-256 before the logits.
    `interaction` is "cross" or "dot"."""

    def __init__(
        self,
        numbers: int,
        features: int,
        dim: int = 128,
        tasks: int = 1,
        interaction: str = "cross",
        bottom: Sequence[int] = BOTTOM,
        top: Sequence[int] = TOP,
        cross_layers: int = 3,
        cross_rank: int = 512,
    ) -> None:
        super().__init__()
        if interaction not in ("cross", "dot"):
            raise TypeError(f"interaction is 'cross' or 'dot', not '{interaction}'")
        vectors = features + 1
        self.bottom = _layers([numbers, *bottom, dim])
        self.interaction: nn.Module
        if interaction == "cross":
            width = vectors * dim
            self.interaction = nn.Sequential(nn.Flatten(-2), LowRankCross(width, cross_layers, cross_rank))
        else:
            width = dim + vectors * (vectors - 1) // 2
            self.interaction = DotInteraction(vectors)
        self.top = nn.Sequential(*_layers([width, *top]), nn.Linear([width, *top][-1], tasks))

    def forward(self, numbers: Tensor, pooled: Tensor) -> Tensor:
        """Logits (..., K) of numbers (..., M) and pooled embeddings (..., F, D)."""
        vectors = torch.cat([self.bottom(numbers).unsqueeze(-2), pooled], -2)
        logits: Tensor = self.top(self.interaction(vectors))
        return logits


class Dlrm(nn.Module):
    """Options: dim D, interaction ("cross" or "dot"), bottom, top, cross_layers, cross_rank, dropout (of pooled
    embeddings), item_dropout (the share of items that training shows as the unknown item). Without `item_table` it
    reads categorical columns and numbers alone, as MLPerf's dlrm-v2 does: neither the item itself nor the history."""

    def __init__(
        self,
        schema: FeatureSchema,
        dim: int = 32,
        interaction: str = "cross",
        bottom: Sequence[int] = (64,),
        top: Sequence[int] = (128, 64),
        cross_layers: int = 3,
        cross_rank: int = 64,
        dropout: float = 0.1,
        item_dropout: float = 0.1,
        item_table: bool = True,
    ) -> None:
        super().__init__()
        self.tokens = PooledTables(schema, dim, item_dropout, item_table)
        if not self.tokens.features:
            raise TypeError("without item_table there have to be categorical columns; this schema has none")
        numbers = schema.candidate_numeric + len(schema.user_numeric)
        self.net = DlrmNet(
            max(numbers, 1),
            self.tokens.features,
            dim,
            len(schema.tasks),
            interaction,
            bottom,
            top,
            cross_layers,
            cross_rank,
        )
        self.dropout = nn.Dropout(dropout)

    def encode(self, history: Tensors) -> dict[str, Tensor]:
        """State: pooled (B, N, D), of each sub-sequence the sum of its items."""
        return {"pooled": self.tokens.history(history)}

    def extend(self, state: Tensors, new: Tensors) -> dict[str, Tensor]:
        """The state with new events added."""
        return {"pooled": state["pooled"] + self.tokens.history(new)}

    def score(self, state: Tensors, candidates: Tensors) -> Tensor:
        """Logits (B, C, K)."""
        pooled = self.dropout(self.tokens.candidates(state["pooled"], candidates))
        logits: Tensor = self.net(_numbers(candidates, pooled[..., 0, :1]), pooled)
        return logits

    def embedded(self) -> tuple[EmbeddedFeature, ...]:
        """What is pooled, in the order of the vectors."""
        return self.tokens.embedded()

    def tables(self) -> dict[str, Tensor]:
        """The tables (rows, D) by name."""
        return self.tokens.tables()

    def score_embedded(self, candidates: Tensors) -> Tensor:
        """Logits (B, C, K) where rows were looked up and pooled elsewhere."""
        pooled = candidates["candidate_embedded"].unflatten(-1, (-1, self.tokens.dim))
        if "context_embedded" in candidates:
            shared = candidates["context_embedded"].unflatten(-1, (-1, self.tokens.dim)).unsqueeze(1)
            pooled = torch.cat([pooled, shared.expand(-1, pooled.shape[1], -1, -1)], -2)
        logits: Tensor = self.net(_numbers(candidates, pooled[..., 0, :1]), pooled)
        return logits


class PooledTables(nn.Module):
    """The tables of a schema, each pooled by a sum. `features` is F, how many pooled vectors a candidate has."""

    def __init__(self, schema: FeatureSchema, dim: int, item_dropout: float, item_table: bool) -> None:
        super().__init__()
        self.dim, self.item_dropout = dim, item_dropout
        self.item = _table(schema.num_item_rows, dim) if item_table else None
        self.item_columns = nn.ModuleList(_table(column.size + 1, dim) for column in schema.item_categorical)
        self.user_columns = nn.ModuleList(_table(column.size + 1, dim) for column in schema.user_categorical)
        self._item_places = _places(schema.item_categorical)
        self._user_places = _places(schema.user_categorical)
        self._item_names = tuple(f"item.{column.name}" for column in schema.item_categorical)
        self._user_names = tuple(f"user.{column.name}" for column in schema.user_categorical)
        self._blocks = schema.num_sub_sequences
        self.features = len(self.embedded())

    def embedded(self) -> tuple[EmbeddedFeature, ...]:
        """F features, those of a candidate before those of a request."""
        own = (EmbeddedSide.ITEM,) if self.item is not None else ()
        blocks = range(self._blocks) if self.item is not None else ()
        dim = self.dim
        return (
            *(EmbeddedFeature("item", dim, side) for side in own),
            *(EmbeddedFeature(n, dim, EmbeddedSide.ITEM_COLUMN, i) for i, n in enumerate(self._item_names)),
            *(EmbeddedFeature("item", dim, EmbeddedSide.HISTORY, block) for block in blocks),
            *(EmbeddedFeature(n, dim, EmbeddedSide.USER_COLUMN, i) for i, n in enumerate(self._user_names)),
        )

    def tables(self) -> dict[str, Tensor]:
        """(rows, D) by name."""
        columns = zip((*self._item_names, *self._user_names), (*self.item_columns, *self.user_columns), strict=True)
        found = {name: table.get_parameter("weight") for name, table in columns}
        return found if self.item is None else {"item": self.item.weight, **found}

    def history(self, history: Tensors) -> Tensor:
        """(B, N, D): of each sub-sequence the sum of its items, padding counting nothing; (B, 0, D) without a table of
        items."""
        if self.item is None:
            return torch.zeros(len(history["history_length"]), 0, self.dim)
        rows = self._shown(history["history_item"])
        index = torch.arange(rows.shape[-1], device=rows.device)
        real = index < history["history_length"].unsqueeze(-1)
        return _sum_of_rows(self.item, torch.where(real, rows, torch.zeros_like(rows)))

    def candidates(self, history: Tensor, candidates: Tensors) -> Tensor:
        """(B, C, F, D) from what was pooled of the history, the candidates and the context."""
        shape, vectors = (*candidates["candidate_item"].shape, -1, -1), []
        if self.item is not None:
            own = self._shown(candidates["candidate_item"]).unsqueeze(-1)
            vectors.append(_sum_of_rows(self.item, own).unsqueeze(-2))
        for table, (first, last, offset) in zip(self.item_columns, self._item_places, strict=True):
            vectors.append(_pooled(table, candidates["candidate_categories"][..., first:last], offset))
        vectors.append(history.unsqueeze(1).expand(shape))
        for table, (first, last, offset) in zip(self.user_columns, self._user_places, strict=True):
            user = _pooled(table, candidates["context_categories"][..., first:last], offset)
            vectors.append(user.unsqueeze(1).expand(shape))
        return torch.cat(vectors, -2)

    def share_unseen(self, seen_rows: Tensor) -> None:
        """Give every item row that training never saw the unknown item's vector. seen_rows (I,) bool."""
        if self.item is not None:
            share_unknown(self.item, seen_rows)

    def _shown(self, rows: Tensor) -> Tensor:
        return hide_items(rows, self.item_dropout) if self.training else rows


def _places(columns: Sequence[Categorical]) -> list[tuple[int, int, int]]:
    """(first, last, offset) of each column: where its values stand, and the code of the first of them."""
    ends = list(accumulate(column.width for column in columns))
    return [(end - column.width, end, column.offset) for column, end in zip(columns, ends, strict=True)]


def _pooled(table: nn.Module, codes: Tensor, offset: int) -> Tensor:
    """(..., 1, D): the sum over a column's codes (..., width); the first code is row 1 of the column's own table."""
    return _sum_of_rows(table, torch.where(codes > 0, codes - (offset - 1), torch.zeros_like(codes))).unsqueeze(-2)


def _sum_of_rows(table: nn.Module, rows: Tensor) -> Tensor:
    """(..., D): the sum over the last dimension of rows, of which row 0 is none."""
    real = (rows != PADDING_ROW).unsqueeze(-1)
    pooled: Tensor = (table(rows) * real).sum(-2)
    return pooled


def _numbers(candidates: Tensors, like: Tensor) -> Tensor:
    """(B, C, M): numbers of the candidates, then those of the user; one zero where there are none. `like` is (B, C,
    1)."""
    shape = (*like.shape[:2], -1)
    parts = [candidates["candidate_numeric"]] if "candidate_numeric" in candidates else []
    if "context_numeric" in candidates:
        parts.append(candidates["context_numeric"].unsqueeze(1).expand(shape))
    if not parts:
        return torch.zeros_like(like)
    return torch.cat(parts, -1)


def _table(rows: int, dim: int) -> nn.Embedding:
    table = nn.Embedding(rows, dim, padding_idx=PADDING_ROW)
    nn.init.normal_(table.weight, std=dim**-0.5)
    nn.init.zeros_(table.weight[PADDING_ROW])
    return table


def _layers(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU behind each."""
    made: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        made += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*made)
