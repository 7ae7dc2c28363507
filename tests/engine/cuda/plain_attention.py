"""Attention over user states as plain torch writes it, in float64, a user and a block at a time; made-up batches."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from rankd.engine.cuda.kernels.triton_attention_steps import AttentionTables, Weighting
from rankd.engine.cuda.kernels.triton_pieces import LOG2_E
from rankd.engine.cuda.paged_states import FP8_LARGEST, PagedStates, PageType, pages_of
from rankd.models.blocks import time_bucket

ON_GPU = os.environ.get("RANKD_TEST_GPU") == "1"
PAGE = 64 if ON_GPU else 16


@dataclass(frozen=True)
class Sizes:
    """Of a made-up model."""

    blocks: int = 2
    layers: int = 2
    heads: int = 2
    head: int = 16
    distances: int = 20

    @property
    def width(self) -> int:
        """A."""
        return self.heads * self.head


def tables_of(sizes: Sizes, weighting: Weighting = Weighting.SOFTMAX, biased: bool = True) -> AttentionTables:
    """Random temperatures and biases, as a kernel wants them."""
    shape = sizes.blocks, sizes.layers, sizes.heads
    factor = LOG2_E if weighting is Weighting.SOFTMAX else 1.0
    return AttentionTables(
        (0.1 + torch.rand(shape)) * factor,
        torch.randn(*shape, sizes.distances) * factor if biased else None,
        torch.randn(*shape, 48) * factor if biased else None,
        weighting,
        1.0 if weighting is Weighting.SOFTMAX else 1 / 50,
    )


def states_of(sizes: Sizes, lengths: Tensor, kind: PageType) -> PagedStates:
    """Random pages of histories of `lengths` (U, N); what nobody should read is huge."""
    most = max(pages_of(int(lengths.max()), PAGE), 1)
    count = lengths.numel() * most
    pool = torch.randn(count, sizes.layers, 2, PAGE, sizes.width)
    times = torch.randint(0, 10**6, (count, PAGE), dtype=torch.int32)
    table = torch.randperm(count).to(torch.int32).view(*lengths.shape, most)
    for user, block in torch.cartesian_prod(torch.arange(lengths.shape[0]), torch.arange(lengths.shape[1])).tolist():
        for number in range(most):
            rest = max(int(lengths[user, block]) - number * PAGE, 0)
            pool[table[user, block, number], :, :, rest:] = 400.0
    scales = torch.empty(0, sizes.layers, 2, PAGE, sizes.heads)
    if kind is PageType.FP8:
        scales = pool.unflatten(-1, (sizes.heads, -1)).abs().amax(-1) / FP8_LARGEST
        pool = pool / scales.repeat_interleave(sizes.head, -1)
    return PagedStates(pool.to(kind.dtype), scales, times, table)


def rows_in(states: PagedStates, user: int, block: int, layer: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (length, A) float64 and times (length,) of one block of one user."""
    pages = states.table[user, block].long()
    numbers = states.keys_values[pages, layer].double()
    if states.fp8:
        heads = states.scales.shape[-1]
        numbers = numbers * states.scales[pages, layer].double().repeat_interleave(numbers.shape[-1] // heads, -1)
    keys, values = (numbers[:, which].flatten(0, 1)[:length] for which in (0, 1))
    return keys, values, states.times[pages].flatten()[:length]


def attention(
    queries: Tensor, keys: Tensor, values: Tensor, distance: Tensor, seconds: Tensor, tables: AttentionTables,
    block: int, layer: int,
) -> Tensor:  # fmt: skip
    """(Q, A) of queries (Q, A), keys and values (Q, T, A) or (T, A), distance and seconds (Q, T). Below 0: hidden."""
    heads = tables.heads
    keys, values = (part.expand(len(queries), *part.shape[-2:]) for part in (keys, values))
    q, k, v = (part.double().unflatten(-1, (heads, -1)) for part in (queries, keys, values))
    logits = torch.einsum("qhd,qthd->hqt", q, k) * tables.temperature[block, layer].double()[:, None, None]
    if tables.positions is not None and tables.times is not None:
        place = distance.clamp(0, tables.distances - 1).long()
        logits = logits + tables.positions[block, layer].double()[:, place]
        logits = logits + tables.times[block, layer].double()[:, time_bucket(seconds).long()]
    hidden = (distance < 0)[None]
    if tables.weighting is Weighting.SOFTMAX:
        weights = torch.softmax((logits / LOG2_E).masked_fill(hidden, -torch.inf), -1)
    else:
        weights = (torch.nn.functional.silu(logits) * tables.inverse_length).masked_fill(hidden, 0.0)
    return torch.einsum("hqt,qthd->qhd", weights, v).flatten(1)
