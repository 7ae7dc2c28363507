"""Looking rows up in this process: RowCache beside a Python dict, the same keys to both, in turn.

In: rows of the most popular items and requests' keys. Out: microseconds for 1,000 keys, found and decoded into the
arrays that a model reads. Keys follow the law of the requests, so some are not there.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np

from rankd.bench.feature_suite.dict_cache import DictCache
from rankd.bench.feature_suite.feature_rows import item_row_schema, packed_items
from rankd.bench.feature_suite.zipf_requests import ZipfRequests
from rankd.errors import EngineFailure
from rankd.features.cache.row_cache import RowCache
from rankd.features.catalogue import Catalogue
from rankd.features.rows.row_decoding import RowDecoder, RowStatus
from rankd.features.schema import FIRST_ITEM_ROW, FeatureSchema
from rankd.types import Array, Float32Array, Int32Array

KEYS = 1000
BATCHES = 200
INSERTED_AT_ONCE = 512
FOR_EVER_MS = 2**40
NOW_MS = 2**30
Arrays = tuple[Float32Array, Int32Array, Array]


@dataclass(frozen=True, slots=True)
class LookupFigures:
    """Medians in microseconds for 1,000 keys, the share of keys that was found, and bytes that a row takes."""

    us_per_1000: float
    dict_us_per_1000: float
    found: float
    dict_found: float
    bytes_a_row: float
    dict_bytes_a_row: float


def measure_lookups(
    catalogue: Catalogue, schema: FeatureSchema, requests: ZipfRequests, budget_bytes: int, seed: int
) -> LookupFigures:
    """Fill both caches with the most popular rows, then ask both for the same keys, batch by batch.

    Raises:
        EngineFailure: they decode different values.
    """
    row_schema, keys = item_row_schema(schema), catalogue.keys()[FIRST_ITEM_ROW:]
    caches = RowCache(row_schema.row_words, budget_bytes), DictCache(row_schema.row_words, budget_bytes)
    # The least popular first: of what nobody has used the oldest leaves.
    places = requests.popular_items(min(caches[1].slots, len(keys)))[::-1]
    rows = packed_items(catalogue, schema, seed, places)
    words = {column.name: catalogue.vocabulary("item", column.name) for column in schema.item_categorical}
    decoder = RowDecoder(row_schema, schema.item_numeric, schema.item_categorical, words)
    for cache in caches:
        for start in range(0, len(places), INSERTED_AT_ONCE):
            some = slice(start, start + INSERTED_AT_ONCE)
            there = np.ones(len(places[some]), bool)
            cache.insert(keys[places[some]], rows[some], there, start, FOR_EVER_MS, FOR_EVER_MS)
    asked = min(KEYS, len(keys))
    spent: tuple[list[float], list[float]] = [], []
    found = [0, 0]
    for batch in range(BATCHES):
        wanted = keys[requests.drawn_items(asked, batch)]
        both = [_arrays(asked, schema) for _ in caches]
        for number in (0, 1) if batch % 2 else (1, 0):
            started = time.perf_counter()
            _look_up(caches[number], wanted, decoder, both[number])
            spent[number].append((time.perf_counter() - started) * 1e6 * KEYS / asked)
            found[number] += int((both[number][2] == RowStatus.FRESH).sum())
        _check_alike(*both)
    ours, theirs = (statistics.median(one) for one in spent)
    used = [cache.memory_bytes / max(cache.used_slots, 1) for cache in caches]
    shares = [one / (asked * BATCHES) for one in found]
    return LookupFigures(ours, theirs, shares[0], shares[1], used[0], used[1])


def _look_up(cache: RowCache | DictCache, keys: Array, decoder: RowDecoder, into: Arrays) -> None:
    """What a request does with its candidates: see what is missing, then decode what is there."""
    numeric, categories, status = into
    cache.probe(keys, NOW_MS, status)
    cache.read(keys, NOW_MS, decoder, numeric, categories, status)


def _arrays(count: int, schema: FeatureSchema) -> Arrays:
    numeric = np.zeros((count, len(schema.item_numeric)), np.float32)
    return numeric, np.zeros((count, schema.item_columns), np.int32), np.zeros(count, np.uint8)


def _check_alike(ours: Arrays, theirs: Arrays) -> None:
    both = (ours[2] == RowStatus.FRESH) & (theirs[2] == RowStatus.FRESH)
    if any(not np.array_equal(mine[both], other[both]) for mine, other in zip(ours, theirs, strict=True)):
        raise EngineFailure("the row cache and the dict decode the same rows differently, so nothing is measured")
