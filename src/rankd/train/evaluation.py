"""Evaluation on a fixed candidate set for each test basket, the ranker and the baselines on the same sets.

A test event is one basket of the test time: the true items of the basket against `num_sampled` others, drawn uniformly
without replacement from the items known when the test began that are not in the basket. Candidates are shuffled, so
that no contestant gains from their order. An item first sold within the test time is part of the truth; nobody knows
it, and everybody gives it the lowest score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rankd.features.schema import UNKNOWN_ROW, FeatureSchema
from rankd.train.ranking_metrics import Interval, ScoredEvents, difference, evaluate
from rankd.train.samples import Dataset, Sample, baskets_between
from rankd.types import Float32Array, Int32Array

Progress = Callable[[int, int, str], None]
"""Called with (done, in all, a line about it)."""

Scorer = Callable[[Sample, Int32Array], Float32Array]
"""A contestant: (the request's sample, candidate rows (C,)) -> scores (C, K) or (C,), higher is better."""


@dataclass(frozen=True, slots=True)
class TestEvent:
    """A sample with its fixed candidates: rows (C,) int32 and labels (C, K) float32."""

    __test__ = False  # not a pytest class

    sample: Sample
    rows: Int32Array
    labels: Float32Array


def make_test_events(
    dataset: Dataset, start: int, end: int, num_sampled: int, seed: int
) -> tuple[list[TestEvent], dict[str, int]]:
    """The test events of [start, end), the same for the same seed, and counts of the baskets left out."""
    samples, counts = baskets_between(dataset, start, end, keep_unseen=True)
    return with_candidates(dataset, samples, num_sampled, seed), counts


def with_candidates(dataset: Dataset, samples: Sequence[Sample], num_sampled: int, seed: int) -> list[TestEvent]:
    """Samples with `num_sampled` other items each, the same for the same seed."""
    random = np.random.default_rng(seed)
    events = []
    for sample in samples:
        others = np.setdiff1d(dataset.snapshots[sample.snapshot].known, sample.items)
        drawn = random.choice(others, min(num_sampled, len(others)), replace=False)
        rows = np.concatenate([sample.items, drawn]).astype(np.int32)
        labels = np.zeros((len(rows), sample.labels.shape[1]), np.float32)
        labels[: len(sample.items)] = sample.labels
        order = random.permutation(len(rows))
        events.append(TestEvent(sample, rows[order], labels[order]))
    return events


def score_events(
    events: Sequence[TestEvent],
    scorer: Scorer,
    schema: FeatureSchema,
    logits: bool,
    progress: Progress = lambda done, total, line: None,
    known_alone: bool = False,
) -> ScoredEvents:
    """Scores of one contestant on every event; tasks are combined by rank weight, labels are the first task's.

    With `known_alone` the entropy leaves out items that the model does not know.
    """
    weights = np.asarray([task.rank_weight for task in schema.tasks], np.float64)
    scores = []
    for done, event in enumerate(events, start=1):
        raw = np.asarray(scorer(event.sample, event.rows), np.float64)
        combined = raw @ weights if raw.ndim == 2 else raw
        combined[event.rows == UNKNOWN_ROW] = schema.missing_item_score if logits else -np.inf
        scores.append(combined)
        progress(done, len(events), "scoring test events")
    return ScoredEvents(
        users=np.asarray([event.sample.user for event in events], np.int64),
        scores=scores,
        labels=[event.labels[:, 0].astype(np.float64) for event in events],
        logits=logits,
        known=[event.rows != UNKNOWN_ROW for event in events] if known_alone else None,
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """The ranker against the best baseline of one metric."""

    metric: str
    best_baseline: str
    margin: Interval
    ranker_half_width: float

    @property
    def beaten(self) -> bool:
        """The margin is larger than the interval of the ranker's own figure, and its own interval is above 0."""
        return self.margin.value > self.ranker_half_width and self.margin.low > 0


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Metrics of every contestant, and the verdicts of the first one against the others."""

    table: dict[str, dict[str, Interval]]
    verdicts: tuple[Verdict, ...]
    num_events: int
    num_users: int


def compare(contestants: dict[str, ScoredEvents], seed: int = 0) -> EvaluationReport:
    """Evaluate all contestants; the first is the ranker, the others are baselines."""
    table = {name: evaluate(scored, seed) for name, scored in contestants.items()}
    ranker, *baselines = contestants
    verdicts = []
    for metric in ("ndcg@10", "gauc") if baselines else ():
        best = max(baselines, key=lambda name: table[name][metric].value)
        margin = difference(contestants[ranker], contestants[best], seed)[metric]
        verdicts.append(Verdict(metric, best, margin, table[ranker][metric].half_width))
    users = contestants[ranker].users
    return EvaluationReport(table, tuple(verdicts), len(users), len(np.unique(users)))
