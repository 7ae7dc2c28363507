"""What a shop would use without a ranker; each is computed from the log before the test began, plus the user's history.

They are the bar that a trained ranker has to clear (`evaluation.compare`).
"""

from __future__ import annotations

import numpy as np

from rankd.train.evaluation import Scorer
from rankd.train.interactions import ANONYMOUS
from rankd.train.samples import Dataset, Sample
from rankd.train.snapshots import SECONDS_A_DAY, item_cosine
from rankd.types import Float32Array, Int32Array


def baselines(dataset: Dataset, as_of: int) -> dict[str, Scorer]:
    """Popularity (all time, last 30 days), bought-before, co-occurrence, and both, from the events before `as_of`.

    Co-occurrence is the mean cosine between the candidate and the distinct items of the history, over the users or
    the baskets that two items have in common; the mean, so that the count of times bought leads where both add up
    (of the weights tried, between .5 and 8 to 1 and with sums in place of means, none did better on this protocol).
    """
    log = dataset.log
    wanted = [log.event_types.index(name) for name in log.description.match_events or log.event_types]
    past = log.before(as_of)
    matching = np.isin(log.events[past], wanted)
    rows, users, times = log.rows[past][matching], log.users[past][matching], log.times[past][matching]
    size = log.num_item_rows
    total = np.bincount(rows, minlength=size).astype(np.float64)
    recent = np.bincount(rows[times >= as_of - 30 * SECONDS_A_DAY], minlength=size).astype(np.float64)
    tie_break = recent / (recent.max() + 1.0)  # below 1: orders what a count leaves equal
    named = users != ANONYMOUS
    by_user = item_cosine(rows[named], users[named], size)
    by_basket = item_cosine(rows, log.baskets[past][matching].astype(np.int32), size)

    def bought(sample: Sample, candidates: Int32Array) -> Float32Array:
        history = dataset.history_before(sample.user, sample.time)
        mine = history.rows[np.isin(history.events, wanted)]
        counts: Float32Array = np.bincount(mine, minlength=size)[candidates].astype(np.float32)
        return counts

    def similar(matrix: object) -> Scorer:
        def scorer(sample: Sample, candidates: Int32Array) -> Float32Array:
            history = dataset.history_before(sample.user, sample.time)
            mine = np.unique(history.rows[np.isin(history.events, wanted)])
            sums = np.asarray(matrix[candidates][:, mine].sum(axis=1)).ravel()  # type: ignore[index]
            mean: Float32Array = sums / max(len(mine), 1) + 1e-9 * tie_break[candidates]
            return mean

        return scorer

    of_users, of_baskets = similar(by_user), similar(by_basket)
    return {
        "popularity, all time": lambda sample, candidates: total[candidates].astype(np.float32),
        "popularity, last 30 days": lambda sample, candidates: recent[candidates].astype(np.float32),
        "bought before, then popularity": lambda sample, candidates: (
            bought(sample, candidates) + tie_break[candidates]
        ).astype(np.float32),
        "co-occurrence (users)": of_users,
        "co-occurrence (baskets)": of_baskets,
        "bought before + co-occurrence (users)": lambda sample, candidates: (
            bought(sample, candidates) + of_users(sample, candidates)
        ),
        "bought before + co-occurrence (baskets)": lambda sample, candidates: (
            bought(sample, candidates) + of_baskets(sample, candidates)
        ),
    }
