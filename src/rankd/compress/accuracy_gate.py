"""The accuracy gate: may a compressed model take the original's place?

In: both models, the dataset, the gate of a recipe. Out: a `GateRecord` whose bounds are judged on the same requests for
both, with intervals over users. Days on which anybody trained or chose weights are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
from torch import nn

from rankd.compress.compression_recipe import Gate
from rankd.errors import DataError
from rankd.gate_record import GatedMetric, GateRecord
from rankd.train.evaluation import Progress, Scorer, TestEvent, make_test_events, score_events
from rankd.train.ranking_metrics import ScoredEvents, evaluate, kept_quality
from rankd.train.samples import Dataset, seconds_of
from rankd.train.trainer import torch_scorer


def gate_events(dataset: Dataset, gate: Gate) -> list[TestEvent]:
    """The requests of the gate's days.

    Raises:
        DataError: the days overlap those of training or validation, hold no time, or too few users.
    """
    start, end = gate_days(dataset, gate)
    if start < dataset.validate_until:
        raise DataError(
            f"the gate's days begin on {_date(start)}, but the weights were trained until {_date(dataset.train_until)} "
            f"and chosen on days until {_date(dataset.validate_until)}; a model is not judged on days that it "
            f"has seen: set gate.since to {_date(dataset.validate_until)} or later"
        )
    if end <= start:
        raise DataError(
            f"the gate's days, {_date(start)} to {_date(end)}, hold no time; the log ends on "
            f"{_date(dataset.schema.log_end)}"
        )
    events, _ = make_test_events(dataset, start, end, gate.sampled, gate.seed)
    users = len({event.sample.user for event in events})
    if users < gate.min_users:
        raise DataError(
            f"{users} users have a request from {_date(start)} to {_date(end)}; an interval over users needs "
            f"{gate.min_users}: widen gate.since and gate.until, or lower gate.min_users and take a wider interval"
        )
    return events


def judge(
    original: nn.Module,
    compressed: nn.Module | Scorer,
    dataset: Dataset,
    gate: Gate,
    events: Sequence[TestEvent],
    progress: Progress = lambda done, total, line: None,
) -> GateRecord:
    """Score the gate's requests with both models and compare, user by user. `compressed` may be engines' graphs."""
    scorers = (
        one if not isinstance(one, nn.Module) else torch_scorer(one.eval(), dataset) for one in (original, compressed)
    )
    theirs, mine = (
        score_events(events, scorer, dataset.schema, True, progress, known_alone=True) for scorer in scorers
    )
    start, end = gate_days(dataset, gate)
    return GateRecord(
        since=_date(start),
        until=_date(end),
        num_requests=len(events),
        num_users=len(np.unique(mine.users)),
        sampled=gate.sampled,
        seed=gate.seed,
        metrics=gated_metrics(theirs, mine, gate),
    )


def gated_metrics(original: ScoredEvents, compressed: ScoredEvents, gate: Gate) -> dict[str, GatedMetric]:
    """The metrics that have a bound, of the same requests scored by both.

    Raises:
        DataError: a score of the compressed model is no number, or the original's value is 0.
    """
    if not all(np.isfinite(scores).all() for scores in compressed.scores):
        raise DataError(
            "the compressed model gives scores that are no numbers; lower finetune.learning_rate, or calibrate int8 on "
            "other requests"
        )
    before, after = evaluate(original, gate.seed), evaluate(compressed, gate.seed)
    kept = kept_quality(compressed, original, gate.bounds, gate.seed)
    return {
        name: GatedMetric(
            original=before[name].value,
            compressed=after[name].value,
            kept=kept[name].value,
            low=kept[name].low,
            high=kept[name].high,
            bound=bound,
        )
        for name, bound in gate.bounds.items()
    }


def gate_days(dataset: Dataset, gate: Gate) -> tuple[int, int]:
    """The gate's time, in seconds since 1970; the second is excluded."""
    start = seconds_of(gate.since) if gate.since else dataset.validate_until
    end = dataset.schema.log_end + 1
    return start, min(seconds_of(gate.until), end) if gate.until else end


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()
