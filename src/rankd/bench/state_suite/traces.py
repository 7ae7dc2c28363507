"""Traces: who asks in which order, and what they do afterwards. From a Zipf law, or from a log as it happened.

In: a workload, or a log file and its description. Out: `Visit`s. `states.py` replays them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from rankd.bench.workload import Workload, zipf_ranks
from rankd.errors import ConfigError, MissingExtra
from rankd.features.schema import FeatureSchema
from rankd.types import Event

EVENTS_SHARE = 0.5  # of the visits of a Zipf trace that are followed by events
MAX_EVENTS = 4


@dataclass(frozen=True, slots=True)
class Visit:
    """A request of a user at a moment (seconds since 1970), and the events that follow it."""

    user_id: str
    time: int
    events: tuple[Event, ...]


def zipf_trace(
    workload: Workload, schema: FeatureSchema, users: Sequence[str], items: Sequence[str], count: int
) -> list[Visit]:
    """`count` visits of returning users, one a second; half of them are followed by 1 to 4 events."""
    random = np.random.default_rng(workload.seed)
    ranks = zipf_ranks(workload.users, random, count)
    visits = []
    for number, rank in enumerate(ranks.tolist()):
        time = schema.log_end + number
        some = int(random.integers(1, MAX_EVENTS + 1)) if random.random() < EVENTS_SHARE else 0
        picked = random.integers(len(items), size=some).tolist()
        kinds = [schema.event_types[k] for k in random.integers(len(schema.event_types), size=some).tolist()]
        events = tuple(Event(items[item], kind, time) for item, kind in zip(picked, kinds, strict=True))
        visits.append(Visit(users[rank % len(users)], time, events))
    return visits


def log_trace(path: Path, describe: str, schema: FeatureSchema, items: Sequence[str]) -> list[Visit]:
    """A log in the order of its baskets: a visit is a basket of a known user, and its lines are the events after it.

    The log's items and event types become the schema's, in turn: what matters here is who comes when, and how much
    their histories grow.

    Raises:
        ConfigError, DataError: as `rankd train`.
        MissingExtra: the train extra is not installed.
    """
    if importlib.util.find_spec("scipy") is None:
        raise MissingExtra("rankd bench states --trace LOG", "train")
    from rankd.train.description import LogDescription
    from rankd.train.interactions import ANONYMOUS, read_log
    from rankd.train.run import packaged_or_file

    if not describe:
        raise ConfigError(f"--trace {path} is a log; say with --describe what its columns mean, as in `rankd train`")
    log = read_log(path, packaged_or_file(LogDescription, "logs", describe))
    known = np.flatnonzero(log.users != ANONYMOUS)
    order = known[np.lexsort((known, log.baskets[known], log.users[known]))]
    same = np.diff(log.baskets[order], prepend=-1) | np.diff(log.users[order], prepend=-1)
    starts = [*np.flatnonzero(same).tolist(), len(order)]
    visits = []
    for start, end in pairwise(starts):
        lines = order[start:end].tolist()
        time = int(log.times[lines[0]])
        events = tuple(
            Event(items[int(log.rows[line]) % len(items)], schema.event_types[line % len(schema.event_types)], time)
            for line in lines
        )
        visits.append(Visit(log.user_ids[int(log.users[lines[0]])], time, events))
    visits.sort(key=lambda visit: visit.time)
    return visits
