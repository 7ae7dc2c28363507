"""Ranking metrics of scored test events, with confidence intervals over users.

An event is one request with its answers: C scores and labels. AUC and NDCG of an event treat equal scores as the
expectation over their orders would (AUC) or by a seeded shuffle done before scoring (NDCG, HR).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from rankd.errors import DataError

Float64Array = npt.NDArray[np.float64]
RESAMPLES = 1000
METRICS = ("ndcg@10", "gauc", "hr@10", "auc", "ne")
GATED = ("ndcg@10", "gauc", "hr@10", "ne")
"""Metrics that are ratios of sums over users, so that two models can be compared user by user."""


@dataclass(frozen=True, slots=True)
class ScoredEvents:
    """n events of one contestant: users (n,), and for each event its scores (C,) and labels (C,) of 0 and 1.

    `logits` says that the scores are logits of the label, so that normalised entropy means something. It is taken over
    the candidates that are `known` (C,), if that is given: a fixed score of the others hides what models differ in.
    """

    users: npt.NDArray[np.int64]
    scores: Sequence[Float64Array]
    labels: Sequence[Float64Array]
    logits: bool
    known: Sequence[npt.NDArray[np.bool_]] | None = None


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95% interval from resampling users; `half_width` is half of the interval's length."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of high - low."""
        return (self.high - self.low) / 2


def evaluate(events: ScoredEvents, seed: int = 0) -> dict[str, Interval]:
    """Every metric of METRICS that the scores allow.

    ndcg@10 and hr@10 (is a positive among the first ten) and gauc (AUC within an event) are means over events; auc
    pools all events; ne is the log loss over the entropy of the overall positive rate (He et al. 2014).
    """
    draws = user_draws(events.users, seed)
    result = {name: ratio_interval(*sums, draws) for name, sums in _sums(events).items()}
    result["auc"] = _pooled_auc_interval(events, draws[:200])
    return {name: result[name] for name in METRICS if name in result}


def difference(one: ScoredEvents, other: ScoredEvents, seed: int = 0) -> dict[str, Interval]:
    """The paired difference one - other of ndcg@10, gauc and hr@10: the same users are drawn for both."""
    draws = user_draws(one.users, seed)
    mine, theirs = _sums(one), _sums(other)
    return {
        name: ratio_interval(mine[name][0] - theirs[name][0], mine[name][1], draws)
        for name in ("ndcg@10", "gauc", "hr@10")
    }


def kept_quality(
    one: ScoredEvents, other: ScoredEvents, metrics: Iterable[str] = GATED, seed: int = 0
) -> dict[str, Interval]:
    """How much of the quality of `other` `one` has, on the same events: ratios of metrics of GATED, paired over users.

    Normalised entropy is turned over, other / one: above 1 is always better.

    Raises:
        DataError: a draw of users for whom the divisor is 0, so that there is no ratio.
    """
    draws = user_draws(one.users, seed)
    mine, theirs = _sums(one), _sums(other)
    made = {}
    for name in metrics:
        numerator, divisor = mine[name][0], theirs[name][0]
        if name == "ne":
            numerator, divisor = divisor, numerator
        if not (draws @ divisor).all():
            raise DataError(
                f"{name} is 0 for some draws of {draws.shape[1]} users, and a share of 0 means nothing; judge on more "
                "users, or by another metric"
            )
        made[name] = ratio_interval(numerator, divisor, draws)
    return made


def user_draws(users: npt.NDArray[np.int64], seed: int) -> Float64Array:
    """(RESAMPLES, U) how often each distinct user is drawn in each bootstrap sample."""
    count = len(np.unique(users))
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)


def ratio_interval(numerator: Float64Array, denominator: Float64Array, draws: Float64Array) -> Interval:
    """The interval of sum(numerator) / sum(denominator), both (U,) sums a user."""
    values = (draws @ numerator) / (draws @ denominator)
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(numerator.sum() / denominator.sum()), float(low), float(high))


def ndcg_at(scores: Float64Array, labels: Float64Array, k: int) -> float:
    """Normalised discounted cumulative gain of the first k, binary gains."""
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    top = labels[np.argsort(-scores, kind="stable")[:k]]
    ideal = discount[: min(int(labels.sum()), k)].sum()
    return float((top * discount[: len(top)]).sum() / ideal)


def auc_of(scores: Float64Array, labels: Float64Array) -> float:
    """Probability that a positive is above a negative, a tie counting half."""
    positives = labels.sum()
    negatives = len(labels) - positives
    ranks = rankdata(scores)[labels > 0].sum()
    return float((ranks - positives * (positives + 1) / 2) / (positives * negatives))


def _sums(events: ScoredEvents) -> dict[str, tuple[Float64Array, Float64Array]]:
    """Numerator and denominator a user of each metric that is a ratio of sums."""
    _, user = np.unique(events.users, return_inverse=True)
    pairs = list(zip(events.scores, events.labels, strict=True))
    ones = np.bincount(user).astype(np.float64)
    result = {
        "ndcg@10": (_per_user(user, [ndcg_at(s, y, 10) for s, y in pairs]), ones),
        "gauc": (_per_user(user, [auc_of(s, y) for s, y in pairs]), ones),
        "hr@10": (_per_user(user, [float(y[np.argsort(-s, kind="stable")[:10]].any()) for s, y in pairs]), ones),
    }
    if events.logits:
        if events.known is not None:
            pairs = [(s[known], y[known]) for (s, y), known in zip(pairs, events.known, strict=True)]
        rate = float(np.concatenate([y for _, y in pairs]).mean())
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
        losses = [float((np.logaddexp(0.0, s) - y * s).sum()) for s, y in pairs]
        sizes = [len(y) * entropy for _, y in pairs]
        result["ne"] = (_per_user(user, losses), _per_user(user, sizes))
    return result


def _per_user(user: npt.NDArray[np.intp], values: Sequence[float]) -> Float64Array:
    """Sums of values (n,) by their user (n,)."""
    return np.bincount(user, np.asarray(values, np.float64)).astype(np.float64)


def _pooled_auc_interval(events: ScoredEvents, draws: Float64Array) -> Interval:
    _, user = np.unique(events.users, return_inverse=True)
    scores, labels = np.concatenate(events.scores), np.concatenate(events.labels)
    owner = np.repeat(user, [len(y) for y in events.labels])
    order = np.argsort(scores, kind="stable")
    labels, owner, scores = labels[order], owner[order], scores[order]
    _, group = np.unique(scores, return_inverse=True)

    def weighted(weights: Float64Array) -> float:
        positive = np.bincount(group, weights * labels)
        negative = np.bincount(group, weights * (1 - labels))
        below = np.cumsum(negative) - negative
        return float((positive * (below + negative / 2)).sum() / (positive.sum() * negative.sum()))

    low, high = np.quantile([weighted(draw[owner]) for draw in draws], [0.025, 0.975])
    return Interval(weighted(np.ones(len(labels))), float(low), float(high))
