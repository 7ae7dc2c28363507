"""The launches that a ranker's calls are made of, on memory that was taken before: what a CUDA graph records.

`ScoreSteps`: candidates and pages -> logits. `HistorySteps`: new events and pages -> their keys and values. Shapes are
those of a bucket; which of the rows are real stands in memory. What is inside of a layer, its kind knows
(`ranker_weights.Layers`). Next: `cuda_executor.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankd.engine.cuda.cuda_device import Device
from rankd.engine.cuda.kernels.triton_candidate_attention import CandidateRows, attend_candidates
from rankd.engine.cuda.kernels.triton_history_attention import HistoryRows, attend_history
from rankd.engine.cuda.kernels.triton_pooled_gather import PoolingRows, pool
from rankd.engine.cuda.kernels.triton_projection import Linear, project
from rankd.engine.cuda.kernels.triton_state_rows import store_rows
from rankd.engine.cuda.ranker_weights import RankerWeights
from rankd.engine.cuda.state_pool import StatePool

Tensors = Mapping[str, Tensor]
"""What a call has sent, by the names of `call_shapes.py`."""


@dataclass(frozen=True, slots=True)
class Block:
    """How many rows a tile of attention has, and tokens a page: powers of two, at least 16."""

    tile: int = 64
    page: int = 64


class HistorySteps:
    """New events of U users, R rows a block at most. `fresh` (N, L, 2, R, A) is what leaves."""

    def __init__(self, device: Device, weights: RankerWeights, pool: StatePool, sent: Tensors, block: Block) -> None:
        self._weights, rows, dtype = weights, sent["ids"].shape[1], pool.shape.dtype
        self._rooms = weights.layers.rooms(device, rows, dtype)
        self._states = pool.states(sent["table"])
        self._rows = HistoryRows(sent["tiles"], sent["known"], sent["row_times"], block.tile)
        self._counts = sent["counts"]
        self._pooled = PoolingRows(sent["ids"], sent["counts"], sent.get("numbers"))
        shape = weights.blocks, weights.layers.depth, 2, rows, weights.attention_width
        self.fresh = device.empty(shape, dtype)

    def __call__(self) -> None:
        """Everything; of the last layer keys and values alone are needed."""
        rooms, weights = self._rooms, self._weights
        pool(rooms.tokens, weights.events, self._pooled)
        for depth in range(weights.layers.depth):
            rooms.project(depth, self._counts)
            store_rows(self._states, self.fresh, rooms.qkv, self._rows, depth)
            if depth < weights.layers.depth - 1:
                attend_history(rooms.attended, rooms.qkv, self._rows, self._states, weights.tables, depth)
                rooms.finish(depth, self._counts)


class ScoreSteps:
    """R candidate rows of U users. `logits` (1, R, K) float32 is what leaves."""

    def __init__(self, device: Device, weights: RankerWeights, pool: StatePool, sent: Tensors, block: Block) -> None:
        self._weights, self._sent, self._counts = weights, sent, sent["counts"]
        dtype, rows, users = pool.shape.dtype, sent["ids"].shape[1], sent["now"].shape[0]
        self._rooms = weights.layers.rooms(device, rows, dtype)
        self._join = weights.layers.joining(device, rows, dtype, self._rooms.tokens)
        self._states = pool.states(sent["table"])
        self._rows = CandidateRows(sent["tiles"], sent["known"], sent["now"], block.tile)
        self._added = device.empty((1, rows, weights.width), torch.float32) if weights.numeric else None
        self._users = device.empty((1, users, weights.width), torch.float32) if weights.users else None
        self._inner = [device.empty((1, rows, max(weights.hidden, weights.width)), dtype) for _ in range(2)]
        self.logits = device.empty((1, rows, weights.num_tasks), torch.float32)

    def __call__(self) -> None:
        """Everything."""
        rooms, weights = self._rooms, self._weights
        self._embed()
        for depth in range(weights.layers.depth):
            rooms.project(depth, self._counts)
            attend_candidates(rooms.attended, rooms.qkv, self._rows, self._states, weights.tables, depth)
            rooms.finish(depth, self._counts)
        self._through(weights.head, self._join(self._counts), self.logits)
        if weights.direct is not None:
            self._through(weights.direct, self._sent["numbers"], self.logits, self.logits)

    def _embed(self) -> None:
        weights, sent = self._weights, self._sent
        if weights.users is not None and self._users is not None:
            rows = PoolingRows(sent["user_ids"], sent["user_count"], sent.get("user_numbers"))
            pool(self._users, weights.users, rows)
        if weights.numeric is not None and self._added is not None:
            self._through(weights.numeric, sent["numbers"], self._added)
        rows = PoolingRows(
            sent["ids"],
            self._counts,
            added=self._added,
            users=None if self._users is None else self._users[0],
            user_of=sent["user_of"],
        )
        pool(self._rooms.tokens, weights.candidates, rows)

    def _through(self, layers: Sequence[Linear], x: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        """A network of a few layers; the last one writes `out`."""
        for number, layer in enumerate(layers[:-1]):
            made = self._inner[number % 2][..., : layer.weight.shape[1]]
            project(made, x, layer, self._counts)
            x = made
        project(out, x, layers[-1], self._counts, residual=residual)
