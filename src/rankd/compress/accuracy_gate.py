"""The accuracy gate: may a compressed model take the original's place?

In: both models, the dataset, the gate of a recipe. Out: a `GateRecord` whose bounds are judged on the same requests for
both, with intervals over users. Days on which anybody trained or chose weights are refused.
"""

from __future__ import annotations

import msgspec
import numpy as np
from torch import nn

from rankd.compress.compression_recipe import Gate
from rankd.errors import DataError
from rankd.gate_record import GatedMetric, GateRecord
from rankd.train.evaluation import Progress, Scorer, TestEvent, make_test_events, score_events
from rankd.train.ranking_metrics import ScoredEvents, evaluate, kept_quality
from rankd.train.samples import Dataset, date_of, seconds_of
from rankd.train.trainer import torch_scorer

DAY_S = 86_400


def gate_events(dataset: Dataset, gate: Gate) -> list[TestEvent]:
    """The requests of the gate's days.

    Raises:
        DataError: the days overlap those of training or validation, hold no time, or too few users.
    """
    start, end = gate_days(dataset, gate)
    if start < dataset.validate_until:
        raise DataError(
            f"the gate's days begin on {date_of(start)}, but the weights were trained until "
            f"{date_of(dataset.train_until)} and chosen on days until {date_of(dataset.validate_until)}; a model is "
            f"not judged on days that it has seen: set gate.since to {date_of(dataset.validate_until)} or later"
        )
    if end <= start:
        raise DataError(
            f"the gate's days, {date_of(start)} to {date_of(end)}, hold no time; the log ends on "
            f"{date_of(dataset.schema.log_end)}"
        )
    events, _ = make_test_events(dataset, start, end, gate.sampled, gate.seed)
    users = len({event.sample.user for event in events})
    if users < gate.min_users:
        raise DataError(
            f"{users} users have a request from {date_of(start)} to {date_of(end)}; an interval over users needs "
            f"{gate.min_users}: widen gate.since and gate.until, or lower gate.min_users and take a wider interval"
        )
    return events


class AccuracyGate:
    """The gate of some days. The original's scores are computed for the first model that is judged, and kept.

    Raises:
        DataError: as `gate_events`.
    """

    def __init__(self, original: nn.Module, dataset: Dataset, gate: Gate) -> None:
        self.dataset, self.gate = dataset, gate
        self.events = gate_events(dataset, gate)
        self._original = original
        self._theirs: ScoredEvents | None = None

    def judge(self, compressed: nn.Module | Scorer, progress: Progress = lambda done, total, line: None) -> GateRecord:
        """Score the gate's requests and compare with the original, user by user.

        A module is scored by torch in float32; a scorer may be engines' graphs.

        Raises:
            DataError: as `gated_metrics`.
        """
        if self._theirs is None:
            self._theirs = self._scored(self._original, progress)
        mine = self._scored(compressed, progress)
        start, end = gate_days(self.dataset, self.gate)
        return GateRecord(
            since=date_of(start),
            until=date_of(end),
            num_requests=len(mine.users),
            num_users=len(np.unique(mine.users)),
            sampled=self.gate.sampled,
            seed=self.gate.seed,
            metrics=gated_metrics(self._theirs, mine, self.gate),
        )

    def _scored(self, model: nn.Module | Scorer, progress: Progress) -> ScoredEvents:
        scorer = torch_scorer(model.eval(), self.dataset) if isinstance(model, nn.Module) else model
        return score_events(self.events, scorer, self.dataset.schema, True, progress, known_alone=True)


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


def split_days(dataset: Dataset, gate: Gate, choose_until: str) -> tuple[Gate, Gate]:
    """The gate's days cut in two: those on which a search chooses, and those on which its choice is judged.

    `choose_until` is a date; "" is midnight in their middle.

    Raises:
        DataError: the date leaves no day on one of its sides.
    """
    start, end = gate_days(dataset, gate)
    middle = (start + end) // 2
    cut = seconds_of(choose_until) if choose_until else middle - middle % DAY_S
    if not start < cut < end:
        raise DataError(
            f"the gate's days, {date_of(start)} to {date_of(end)}, are not cut in two by {date_of(cut)}: a search "
            "needs days to choose on and others to judge its choice; set choose_until between gate.since and gate.until"
        )
    return msgspec.structs.replace(gate, until=date_of(cut)), msgspec.structs.replace(gate, since=date_of(cut))
