"""`rankd demo`: serve the packaged model, send it real requests over HTTP, show who was ranked what and how fast."""

from __future__ import annotations

import json
import signal
import threading
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rankd.client import Client
from rankd.demo import MODELS
from rankd.ranker import Ranker
from rankd.serve.lifecycle import Server
from rankd.serve.settings import ServeConfig
from rankd.types import RankRequest, Scores

TIMED_REQUESTS = 200
CANDIDATES = 20
SHOWN_USERS = 3
SHOWN_EVENTS = 4
TOP = 5


def run(host: str, port: int, once: bool, as_json: bool) -> None:
    """The command. Stays up until interrupted unless `once`.

    Raises:
        ConfigError: the address is taken.
    """
    started = time.perf_counter()
    console = Console(stderr=as_json)
    with Server(MODELS, ServeConfig(host=host, port=port)) as server, Client(server.url) as client:
        startup_s = time.perf_counter() - started
        ranker = server.repository.get()
        shown = [_show(client, ranker, user, console) for user in (*_users(ranker), "somebody new")]
        latency, stages = _measure(client, ranker)
        console.print(
            f"\n{latency['requests']} requests of {CANDIDATES} candidates over HTTP: p50 {latency['p50']:.2f} ms, "
            f"p99 {latency['p99']:.2f} ms (" + ", ".join(f"{name} {ms:.2f}" for name, ms in stages.items()) + ")"
        )
        if not once:
            console.print(f"\nThe live page is at [bold]{server.url}/[/bold]  (Ctrl-C ends)")
            _wait_for_signal()
        if as_json:
            document = {
                "url": server.url,
                "model": ranker.manifest.name,
                "version": ranker.manifest.version,
                "users": shown,
                "latency_ms": latency,
                "stages_ms": stages,
                "startup_s": round(startup_s, 3),
            }
            print(json.dumps(document), flush=True)


def _users(ranker: Ranker) -> list[str]:
    """Some users with a history of a length that can be shown."""
    sizes = np.diff(ranker.catalogue.users.offsets)
    fitting = np.flatnonzero((sizes >= 8) & (sizes <= 40))[:SHOWN_USERS]
    return [ranker.catalogue.ids.users[user] for user in fitting]


def _candidates(ranker: Ranker, seed: int) -> tuple[str, ...]:
    items = ranker.catalogue.ids.items
    drawn = np.random.default_rng(seed).choice(len(items), CANDIDATES, replace=False)
    return tuple(items[item] for item in drawn)


def _show(client: Client, ranker: Ranker, user: str, console: Console) -> dict[str, Any]:
    """Rank for one user and print the best; returns what was shown."""
    history = ranker.features.stored_history(user)
    rows = [] if history is None else history.rows[::-1].tolist()
    recent = [ranker.catalogue.item_name(row) for row in rows[:SHOWN_EVENTS]]
    scores = client.rank(RankRequest(user, _candidates(ranker, seed=len(rows)), top_k=TOP))
    table = Table("candidate", *scores.tasks, title=f"{user} lately: {', '.join(recent) or 'nothing yet'}")
    top = []
    for item, probability in zip(scores.candidates, _probabilities(scores), strict=True):
        name = ranker.catalogue.item_name(int(ranker.catalogue.rows_of([item])[0]))
        table.add_row(name, *(f"{value:.1%}" for value in probability))
        top.append({"item_id": item, "name": name, "probabilities": dict(zip(scores.tasks, probability, strict=True))})
    console.print(table)
    return {"user_id": user, "history": recent, "top": top}


def _probabilities(scores: Scores) -> list[list[float]]:
    sigmoid: list[list[float]] = np.round(1 / (1 + np.exp(-scores.scores.astype(np.float64))), 4).tolist()
    return sigmoid


def _measure(client: Client, ranker: Ranker) -> tuple[dict[str, float], dict[str, float]]:
    """Latency of requests one after the other, in milliseconds, and the median of the server's stages."""
    users = ranker.catalogue.ids.users
    wall, stages = [], []
    for number in range(TIMED_REQUESTS):
        request = RankRequest(users[number % len(users)], _candidates(ranker, number))
        started = time.perf_counter()
        scores = client.rank(request)
        wall.append((time.perf_counter() - started) * 1e3)
        stages.append(scores.timings_ms)
    p50, p99 = np.percentile(wall, [50, 99])
    medians = {name: round(float(np.median([one[name] for one in stages])), 3) for name in stages[0]}
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3), "requests": TIMED_REQUESTS}, medians


def _wait_for_signal() -> None:
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    asked.wait()
