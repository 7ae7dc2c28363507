"""Requests whose candidates follow a Zipf law, made in blocks: any stretch of an endless sequence, always the same.

In: a workload, user and item ids. Out: whole HTTP requests as bytes. Who is popular is drawn once: the item of rank r
is some item of the catalogue, so that neighbours in the item table have nothing in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from rankd.bench.wire_forms import Form, encode_request
from rankd.bench.workload import Users, Workload, zipf_ranks
from rankd.errors import ConfigError
from rankd.types import Array, Int64Array, RankRequest

BLOCK = 128
KEPT_BLOCKS = 64
"""Encoded, so that contestants that are measured after one another get the same bytes: 64 MB at 512 candidates."""


class ZipfRequests:
    """Requests 0, 1, 2, ... of `candidates` items each, the items by rank ** -exponent, none twice in a request.

    Raises:
        ConfigError: fewer items than candidates.
    """

    def __init__(
        self,
        workload: Workload,
        users: Sequence[str],
        items: Sequence[str],
        candidates: int,
        model: str,
        exponent: float = 1.0,
    ) -> None:
        if candidates > len(items):
            raise ConfigError(f"{candidates} candidates of {len(items)} items; ask for fewer, or give more --items")
        self.candidates, self._users, self._items, self._model = candidates, users, items, model
        self._law = Users(min(workload.users.count, len(users)), workload.users.zipf_exponent)
        self._seed = (workload.seed, candidates)
        self._cumulative = zipf_cumulative(len(items), exponent)
        self._item_of_rank = np.random.default_rng(workload.seed).permutation(len(items))
        self._encoded = lru_cache(KEPT_BLOCKS)(self._encode_block)

    def request(self, number: int) -> RankRequest:
        """One of them."""
        ranks = self._ranks_of(number // BLOCK)[number % BLOCK]
        user = int(self._users_of(number // BLOCK)[number % BLOCK])
        return self._request(user, ranks)

    def encoded(self, start: int, count: int) -> list[bytes]:
        """Requests `start` to `start + count - 1`, as tensors over HTTP."""
        blocks = range(start // BLOCK, -(-(start + count) // BLOCK))
        whole = [one for block in blocks for one in self._encoded(block)]
        return whole[start % BLOCK : start % BLOCK + count]

    def share_of_popular(self, count: int, requests: int) -> float:
        """The share of candidates among the `count` most popular items: what a cache that knew them could hit."""
        blocks = range(-(-requests // BLOCK))
        return float(np.mean([(self._ranks_of(block) < count).mean() for block in blocks]))

    def drawn_items(self, count: int, seed: int) -> Int64Array:
        """(count,) items, by their place in the catalogue, drawn as those of a request."""
        random = np.random.default_rng((*self._seed, 1, seed))
        ranks: Int64Array = self._item_of_rank[distinct_ranks(random, self._cumulative, 1, count)[0]]
        return ranks

    def popular_items(self, count: int) -> Int64Array:
        """(count,) the most popular items, by their place in the catalogue, the most popular first."""
        items: Int64Array = self._item_of_rank[:count]
        return items

    def _encode_block(self, block: int) -> list[bytes]:
        users, ranks = self._users_of(block), self._ranks_of(block)
        return [
            encode_request(Form.BINARY, self._request(int(user), row)) for user, row in zip(users, ranks, strict=True)
        ]

    def _request(self, user: int, ranks: Int64Array) -> RankRequest:
        items = self._items
        candidates = tuple(items[place] for place in self._item_of_rank[ranks].tolist())
        return RankRequest(self._users[user], candidates, model=self._model)

    def _users_of(self, block: int) -> Int64Array:
        return zipf_ranks(self._law, np.random.default_rng((*self._seed, 2, block)), BLOCK)

    def _ranks_of(self, block: int) -> Int64Array:
        random = np.random.default_rng((*self._seed, 0, block))
        return distinct_ranks(random, self._cumulative, BLOCK, self.candidates)


def zipf_cumulative(count: int, exponent: float) -> Array:
    """(count,) the probability of rank r and all before it."""
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    cumulative: Array = np.cumsum(weights) / weights.sum()
    return cumulative


def distinct_ranks(random: np.random.Generator, cumulative: Array, rows: int, count: int) -> Int64Array:
    """(rows, count) ranks from 0, none twice in a row: each next one by the law among those that are left.

    Drawn with repetition, then repetitions are passed over, which gives the same law.
    """
    drawn = np.zeros((rows, 0), np.int64)
    while True:
        more = np.searchsorted(cumulative, random.random((rows, 2 * count)), side="right")
        drawn = np.concatenate([drawn, np.minimum(more, len(cumulative) - 1)], axis=1)
        first = _first_of_each(drawn)
        if (first.sum(axis=1) >= count).all():
            chosen = first & (np.cumsum(first, axis=1) <= count)
            ranks: Int64Array = drawn[chosen].reshape(rows, count)
            return ranks


def _first_of_each(drawn: Int64Array) -> Array:
    """Where each value of a row comes for the first time."""
    order = np.argsort(drawn, axis=1, kind="stable")
    ascending = np.take_along_axis(drawn, order, axis=1)
    new = np.ones(drawn.shape, bool)
    new[:, 1:] = ascending[:, 1:] != ascending[:, :-1]
    first = np.empty_like(new)
    np.put_along_axis(first, order, new, axis=1)
    return first
