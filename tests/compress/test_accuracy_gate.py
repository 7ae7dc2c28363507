"""The gate: paired ratios over users, days that nobody has seen, enough users; what passes is the whole interval."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd.compress.accuracy_gate import AccuracyGate, gate_events, gated_metrics
from rankd.compress.compression_recipe import Gate
from rankd.errors import DataError
from rankd.gate_record import GatedMetric
from rankd.models.protocol import create_model
from rankd.train.ranking_metrics import RESAMPLES, ScoredEvents, auc_of, kept_quality, ndcg_at
from tests.train.small_log import RECIPE, small_dataset

DATASET = small_dataset()
GATE = Gate(min_users=20)


def scored(seed: int, noise: float, users: int = 40, events: int = 120) -> ScoredEvents:
    """Events whose labels are the same for every seed of the scores."""
    fixed, random = np.random.default_rng(0), np.random.default_rng(seed)
    labels = [np.concatenate([[1.0], (fixed.random(11) < 0.2).astype(float), [0.0]]) for _ in range(events)]
    scores = [one * 2 - 2 + noise * random.normal(size=13) for one in labels]
    return ScoredEvents(fixed.integers(users, size=events), scores, labels, logits=True)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 50), st.floats(0.5, 3.0), st.floats(0.5, 3.0))
def test_ratios_are_those_of_users_drawn_together(seed: int, mine: float, theirs: float) -> None:
    """Against a plain loop over the draws."""
    one, other = scored(seed, mine), scored(seed + 1, theirs)
    made = kept_quality(one, other, seed=seed)
    assert list(made) == ["ndcg@10", "gauc", "hr@10", "ne"]
    ids = np.unique(one.users)
    draws = np.random.default_rng(seed).multinomial(len(ids), np.full(len(ids), 1 / len(ids)), RESAMPLES)
    for name, metric in (("ndcg@10", lambda s, y: ndcg_at(s, y, 10)), ("gauc", auc_of), ("ne", _loss)):
        pair = [
            np.asarray([metric(s, y) for s, y in zip(each.scores, each.labels, strict=True)]) for each in (one, other)
        ]
        a, b = pair[::-1] if name == "ne" else pair
        counts = draws[:, np.searchsorted(ids, one.users)]
        ratios = (counts * a).sum(1) / (counts * b).sum(1)
        assert made[name].value == pytest.approx(a.sum() / b.sum())
        assert (made[name].low, made[name].high) == pytest.approx(tuple(np.quantile(ratios, [0.025, 0.975])))


def _loss(scores: np.ndarray, labels: np.ndarray) -> float:
    return float((np.logaddexp(0.0, scores) - labels * scores).sum())


def test_items_that_nobody_knows_do_not_hide_a_lost_entropy() -> None:
    """Each request has one more candidate, bought and unknown to both models."""
    good, bad = scored(3, 0.5), scored(4, 1.5)
    plain = gated_metrics(good, bad, GATE)["ne"]

    def with_unknown(events: ScoredEvents) -> ScoredEvents:
        scores = [np.append(one, -30.0) for one in events.scores]
        labels = [np.append(one, 1.0) for one in events.labels]
        known = [np.append(np.ones(len(one), bool), False) for one in events.labels]
        return ScoredEvents(events.users, scores, labels, logits=True, known=known)

    same = gated_metrics(with_unknown(good), with_unknown(bad), GATE)["ne"]
    assert (same.kept, same.low, same.high) == pytest.approx((plain.kept, plain.low, plain.high))
    assert same.original == pytest.approx(plain.original)


def test_a_model_keeps_all_of_its_own_quality() -> None:
    same = gated_metrics(scored(3, 1.0), scored(3, 1.0), GATE)
    assert {(one.kept, one.low, one.high) for one in same.values()} == {(1.0, 1.0, 1.0)}
    assert all(one.passed for one in same.values())


def test_a_worse_model_does_not_pass_and_a_better_one_does() -> None:
    good, bad = scored(3, 0.8), scored(4, 2.5)
    assert not any(one.passed for one in gated_metrics(good, bad, GATE).values())
    assert all(one.passed and one.kept > 1 for one in gated_metrics(bad, good, GATE).values())


def test_the_interval_has_to_pass_and_not_the_value() -> None:
    metric = GatedMetric(original=0.5, compressed=0.5, kept=1.0, low=0.98, high=1.02, bound=0.99)
    assert not metric.passed
    assert msgspec.structs.replace(metric, low=0.99).passed


def test_scores_that_are_no_numbers_are_refused() -> None:
    broken = scored(3, 1.0)
    broken.scores[5][2] = np.nan
    with pytest.raises(DataError, match="no numbers"):
        gated_metrics(scored(3, 1.0), broken, GATE)


def test_a_share_of_nothing_is_refused() -> None:
    right = scored(3, 0.1)
    wrong = ScoredEvents(right.users, [-scores for scores in right.scores], right.labels, logits=True)
    assert kept_quality(wrong, right, ["ndcg@10"])["ndcg@10"].value < 1
    never = ScoredEvents(right.users, [-99.0 * labels for labels in right.labels], right.labels, logits=True)
    with pytest.raises(DataError, match="gauc is 0 for some draws"):
        kept_quality(right, never, ["gauc"])


def day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()


@pytest.mark.parametrize("since", [day(DATASET.train_until - 5 * 86_400), day(DATASET.train_until)])
def test_days_of_training_and_of_validation_are_refused(since: str) -> None:
    with pytest.raises(DataError, match=f"trained until {day(DATASET.train_until)} and chosen on days until"):
        gate_events(DATASET, msgspec.structs.replace(GATE, since=since))


def test_days_without_time_and_too_few_users_are_refused() -> None:
    with pytest.raises(DataError, match="hold no time"):
        gate_events(DATASET, msgspec.structs.replace(GATE, since=day(DATASET.schema.log_end + 9 * 86_400)))
    with pytest.raises(DataError, match="needs 5000"):
        gate_events(DATASET, msgspec.structs.replace(GATE, min_users=5000))
    with pytest.raises(DataError, match="is not a date"):
        gate_events(DATASET, msgspec.structs.replace(GATE, since="September"))


def test_the_record_says_on_what_it_was_judged() -> None:
    model = create_model("climber", DATASET.schema, RECIPE.model.options)
    gate = AccuracyGate(model, DATASET, GATE)
    record = gate.judge(model)
    assert record.passed
    assert record.num_requests == len(gate.events)
    assert record.num_users == len({event.sample.user for event in gate.events})
    assert record.since == day(DATASET.validate_until)
    later = msgspec.structs.replace(GATE, since=day(DATASET.validate_until + 3 * 86_400))
    assert min(event.sample.time for event in gate_events(DATASET, later)) >= DATASET.validate_until + 3 * 86_400


def test_the_original_is_scored_once_for_all_models() -> None:
    original, other = (create_model("climber", DATASET.schema, RECIPE.model.options) for _ in range(2))
    calls = Counter[str]()
    original.get_submodule("head").register_forward_pre_hook(lambda *_: calls.update(["score"]))
    gate = AccuracyGate(original, DATASET, msgspec.structs.replace(GATE, bounds={"gauc": 0.5}))
    first = gate.judge(other)
    assert calls["score"] == len(gate.events)
    assert gate.judge(other) == first
    assert calls["score"] == len(gate.events)
