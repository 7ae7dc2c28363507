"""A seeded synthetic interaction log: people who watch short films. The packaged demo model is trained on it.

    python -m rankd.train.synthetic demo.parquet

What there is to learn: everybody has a few genres, and the share between them drifts; films differ in appeal and wear
off; a liked film brings on others of its genre; what was seen yesterday is not wanted today. A session shows films and
each row is one of them: shown ("view"), opened ("click"), or opened and liked ("like").
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

GENRES = (
    "animation", "comedy", "cooking", "crime", "documentary", "drama",
    "history", "music", "nature", "science", "sport", "travel",
)  # fmt: skip
FIRST_WORDS = (
    "Quiet", "Golden", "Last", "Hidden", "Northern", "Broken", "Little", "Paper", "Silver", "Borrowed",
    "Early", "Distant", "Second", "Blue", "Wandering", "Open", "Winter", "Electric", "Salt", "Velvet",
)  # fmt: skip
SECOND_WORDS = (
    "River", "Kitchen", "Signal", "Garden", "Harbour", "Letters", "Orchard", "Engine", "Summer", "Mountain",
    "Shadow", "Bridge", "Stories", "Island", "Machine", "Season", "Lantern", "Voices", "Atlas", "Journey",
    "Window", "Market", "Horizon", "Clock", "Station", "Feather", "Compass", "Forest", "Mirror", "Tide",
)  # fmt: skip
PLANS = ("basic", "family", "student")
END = datetime(2026, 10, 1, tzinfo=UTC)
DAYS = 90
SHOWN = 12

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]


def synthetic_log(
    seed: int = 11, num_users: int = 1200, num_items: int = 600, num_sessions: int = 10_000
) -> pl.DataFrame:
    """Rows sorted by time: user, item, title, genre, minutes, plan, session, time, event. Equal for equal arguments."""
    random = np.random.default_rng(seed)
    genre = random.integers(len(GENRES), size=num_items)
    appeal = random.normal(0.0, 0.9, num_items)
    minutes = np.round(random.gamma(4.0, 3.0, num_items) + 2.0, 1)
    taste = random.dirichlet(np.full(len(GENRES), 0.25), size=(2, num_users))  # at the log's start and at its end
    activity = random.zipf(1.6, num_users).clip(max=60).astype(np.float64)
    users = random.choice(num_users, num_sessions, p=activity / activity.sum())
    moments = np.sort(random.random(num_sessions))
    titles = _titles(random, num_items)
    plans = random.integers(len(PLANS), size=num_users)
    last_seen = np.full((num_users, num_items), -np.inf)
    liked = np.zeros((num_users, len(GENRES)))
    columns: dict[str, list[npt.NDArray[np.generic]]] = {"user": [], "item": [], "session": [], "time": [], "level": []}
    for session, (user, moment) in enumerate(zip(users, moments, strict=True)):
        share = (1 - moment) * taste[0, user] + moment * taste[1, user]
        want = 5.0 * share[genre] + 0.5 * np.minimum(liked[user, genre], 2.0) + 0.6 * appeal
        shown = _shown(random, want, num_items)
        fresh = np.exp(-(moment - last_seen[user, shown]) * DAYS / 4.0)  # 1: seen just now, 0: long ago or never
        level = _levels(random, want[shown] - 3.4 - 3.0 * fresh)
        last_seen[user, shown[level > 0]] = moment
        liked[user] *= 0.9
        np.add.at(liked[user], genre[shown[level == 2]], 1.0)
        columns["user"].append(np.full(SHOWN, user))
        columns["item"].append(shown)
        columns["session"].append(np.full(SHOWN, session))
        columns["time"].append(
            np.full(SHOWN, int(END.timestamp() - (1 - moment) * DAYS * 86_400)) + np.arange(SHOWN) * 7
        )
        columns["level"].append(level)
    user, item, session_id, time, level = (np.concatenate(columns[name]) for name in columns)
    return pl.DataFrame(
        {
            "user": [f"user-{u:04d}" for u in user],
            "item": [f"film-{i:04d}" for i in item],
            "title": [titles[i] for i in item],
            "genre": [GENRES[g] for g in genre[item]],
            "minutes": minutes[item],
            "plan": [PLANS[p] for p in plans[user]],
            "session": session_id,
            "time": pl.Series(time).cast(pl.Int64),
            "event": [("view", "click", "like")[one] for one in level],
        }
    ).sort("time", maintain_order=True)


def _titles(random: np.random.Generator, count: int) -> list[str]:
    pairs = random.permutation(len(FIRST_WORDS) * len(SECOND_WORDS))[:count]
    return [f"{FIRST_WORDS[p % len(FIRST_WORDS)]} {SECOND_WORDS[p // len(FIRST_WORDS)]}" for p in pairs]


def _shown(random: np.random.Generator, want: Float64Array, num_items: int) -> Int64Array:
    """What some earlier system put on the screen: half by its guess of what is wanted, half by chance."""
    guess = np.exp(want - want.max())
    half = random.choice(num_items, SHOWN // 2, replace=False, p=guess / guess.sum())
    rest = np.setdiff1d(np.arange(num_items), half)
    return random.permutation(np.concatenate([half, random.choice(rest, SHOWN - SHOWN // 2, replace=False)]))


def _levels(random: np.random.Generator, want: Float64Array) -> Int64Array:
    """0 shown, 1 opened, 2 opened and liked."""
    opened = random.random(len(want)) < 1 / (1 + np.exp(-want))
    enjoyed = random.random(len(want)) < 1 / (1 + np.exp(-(want + 0.5)))
    return np.where(opened, 1 + enjoyed, 0)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m rankd.train.synthetic FILE.parquet")
    synthetic_log().write_parquet(Path(sys.argv[1]))
