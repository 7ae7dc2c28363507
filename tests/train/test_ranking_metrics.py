"""Metrics against their slow definitions, and intervals that behave."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.train.ranking_metrics import ScoredEvents, auc_of, difference, evaluate, ndcg_at

EVENTS = st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=2, max_size=30).filter(
    lambda pairs: 0 < sum(label for _, label in pairs) < len(pairs)
)


@given(EVENTS)
def test_auc_counts_pairs(pairs: list[tuple[int, bool]]) -> None:
    scores, labels = (np.asarray(column, np.float64) for column in zip(*pairs, strict=True))
    positives, negatives = scores[labels > 0], scores[labels == 0]
    wins = sum((p > n) + (p == n) / 2 for p in positives for n in negatives)
    assert auc_of(scores, labels) == pytest.approx(wins / (len(positives) * len(negatives)))


@given(EVENTS, st.integers(1, 12))
def test_ndcg_by_hand(pairs: list[tuple[int, bool]], k: int) -> None:
    scores, labels = (np.asarray(column, np.float64) for column in zip(*pairs, strict=True))
    order = sorted(range(len(pairs)), key=lambda i: -scores[i])
    gain = sum(labels[i] / math.log2(rank + 2) for rank, i in enumerate(order[:k]))
    ideal = sum(1 / math.log2(rank + 2) for rank in range(min(k, int(labels.sum()))))
    assert ndcg_at(scores, labels, k) == pytest.approx(gain / ideal)


def scored(strength: float, seed: int = 0) -> ScoredEvents:
    random = np.random.default_rng(seed)
    labels = [(np.arange(30) < 5).astype(np.float64) for _ in range(60)]
    noise = np.random.default_rng(1).normal(size=(60, 30))
    scores = [strength * y + n for y, n in zip(labels, noise, strict=True)]
    return ScoredEvents(random.integers(0, 20, 60), scores, labels, logits=True)


def test_intervals_hold_the_value_and_a_better_ranker_wins() -> None:
    weak, strong = scored(1.0), scored(3.0)
    for events in (weak, strong):
        for interval in evaluate(events).values():
            assert interval.low <= interval.value <= interval.high
    margin = difference(strong, weak)
    assert margin["ndcg@10"].low > 0
    assert margin["gauc"].value == pytest.approx(evaluate(strong)["gauc"].value - evaluate(weak)["gauc"].value)
    same = difference(weak, weak)["gauc"]
    assert (same.low, same.value, same.high) == (0, 0, 0)


def test_normalised_entropy_of_the_base_rate_is_one() -> None:
    labels = [np.asarray([1.0, 0.0, 0.0, 0.0])] * 10
    constant = [np.full(4, math.log(1 / 3))] * 10
    events = ScoredEvents(np.arange(10), constant, labels, logits=True)
    assert evaluate(events)["ne"].value == pytest.approx(1.0)
    assert evaluate(events)["gauc"].value == 0.5
    assert evaluate(events)["auc"].value == pytest.approx(0.5)
