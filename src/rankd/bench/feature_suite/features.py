"""Suite `features`: what keeping rows next to the model is worth. One model, one store, four servers, in turn.

    none     every request fetches its rows and its user's history from the store
    dict     rows in a Python OrderedDict, the least recently used leaves (`dict_cache.py`)
    sync     rankd's row cache; a request waits for rows that are not in it
    async    rankd's row cache; rows that are not in it are fetched for later requests

The store is a Redis of its own behind a proxy that delays (`delaying_proxy.py`), with a row of 256 bytes for each item.
In: a workload's sizes. Out: a Report with a table for each cell, which is a number of candidates and a delay
(`feature_cells.py`), and one for look-ups without a server (`lookups.py`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from rankd.artifact import Artifact
from rankd.bench.ended_in_order import ended_in_order
from rankd.bench.feature_suite.delaying_proxy import DelayingProxy
from rankd.bench.feature_suite.feature_cells import Cell, Scene, Turns, find_rates, hit_rate, measure_round
from rankd.bench.feature_suite.feature_report import Measured, WarmUp, about, ratios, results
from rankd.bench.feature_suite.feature_rows import fill_store
from rankd.bench.feature_suite.feature_server import ASYNC, CONTESTANTS, FeatureServer, ServerFigures, Setting
from rankd.bench.feature_suite.feature_subject import FeatureOptions, Subject, prepare
from rankd.bench.feature_suite.redis_process import HOST, RedisProcess, round_trip_ms
from rankd.bench.feature_suite.zipf_requests import ZipfRequests
from rankd.bench.parity import SAME, check_same
from rankd.bench.placement import on_cpus, placement
from rankd.bench.report import Neighbours, Report, commit, machine
from rankd.bench.serve_suite.serving import IN_PROCESS, Advance
from rankd.bench.wire_forms import Form, decode_scores, encode_request
from rankd.bench.workload import Workload
from rankd.errors import EngineFailure
from rankd.features.feature_config import MIB

STEADY = 0.01
"""Change of a hit rate from one stretch of the warm-up to the next that counts as none."""
STRETCH, MOST_STRETCHES = 2, 20
"""Rows that are looked up in a stretch of the warm-up, as multiples of what a cache holds; stretches at most."""
WARM_SECONDS = 600.0
SETTLE_SECONDS, SETTLE_STEP = 20.0, 0.2
CALIBRATIONS = 4


def run_features(workload: Workload, options: FeatureOptions, advance: Advance) -> Report:
    """Run the suite.

    Raises:
        ConfigError: there is no redis-server here, or fewer items than candidates.
        MissingExtra: torch is not installed.
        EngineFailure: the scores of the contestants differ, or a contestant failed.
        Unavailable: one of the processes did not start, or ended.
    """
    cells = len(options.candidates) * len(options.delays_ms)
    steps = 4 + cells * (1 + options.runs)
    surroundings, place = machine(), placement()
    with ended_in_order(), tempfile.TemporaryDirectory(prefix="rankd-bench-") as folder, ExitStack() as running:
        redis = RedisProcess(Path(folder) / "redis")
        advance(0, steps, "model and parity")
        subject = prepare(workload, options, Path(folder))
        advance(1, steps, "filling the store")
        with on_cpus(place.others):
            running.enter_context(redis)
            proxy = running.enter_context(DelayingProxy(redis.port))
        fill_store(redis.url, subject.name, subject.files)
        advance(2, steps, "servers")
        setting = _setting(subject, options, proxy, Path(folder) / "served")
        servers = [running.enter_context(FeatureServer(setting, one, place.server)) for one in CONTESTANTS]
        scene = Scene(servers, redis, proxy, place)
        measured = Measured(place.describe(), {IN_PROCESS: subject.parity, **_check_parity(scene, subject)})
        neighbours = Neighbours()
        advance(3, steps, "warm-up")
        _measure(scene, subject, options, measured, lambda done, what: advance(4 + done, steps, what))
    surroundings["others_cpu_share"] = neighbours.share()
    advance(steps, steps, "done")
    return Report(
        suite="features",
        workload=about(subject, options, measured),
        machine=surroundings,
        commit=commit(),
        parity=measured.parity,
        results=results(subject, measured),
        ratios=ratios(subject, measured),
    )


def _setting(subject: Subject, options: FeatureOptions, proxy: DelayingProxy, root: Path) -> Setting:
    """The model alone in a repository, and what all servers are told."""
    manifest = Artifact.open(subject.path).manifest
    (root / manifest.name).mkdir(parents=True)
    (root / manifest.name / manifest.version).symlink_to(subject.path, target_is_directory=True)
    url = f"redis://{HOST}:{proxy.port}/0"
    return Setting(root, url, subject.files.no_histories, subject.budget_bytes / MIB, options.ttl_seconds)


def _check_parity(scene: Scene, subject: Subject) -> dict[str, float]:
    """The largest difference of each contestant's scores to those in process, all of them from rows of the store.

    Raises:
        EngineFailure: they differ, or a contestant did without rows.
    """
    requests = [encode_request(Form.BINARY, request) for request in subject.checked]
    worst = {}
    for server in scene.servers:
        name = server.contestant.name
        if server.contestant == ASYNC:
            for request in requests:
                server.exchange(request)
            _settle(server)
        before = server.figures()
        given = [decode_scores(Form.BINARY, server.exchange(request)) for request in requests]
        after = server.figures()
        worst[name] = check_same(name, subject.expected, given, SAME[subject.about["precision"]])
        fresh = after.rows["fresh"] - before.rows["fresh"]
        wanted = 1 if server.contestant == ASYNC else sum(len(request.candidates) for request in subject.checked)
        if fresh < wanted:
            raise EngineFailure(f"contestant '{name}' used {fresh:.0f} rows of the store, so nothing is measured")
    return worst


def _measure(
    scene: Scene, subject: Subject, options: FeatureOptions, measured: Measured, step: Callable[[int, str], None]
) -> None:
    """Warm up once, then all cells: what is cached depends on the items alone, not on their number a request."""
    turns, done = Turns(), 0
    _set_delay(scene, options.delays_ms[0])
    step(-1, "warm-up")
    measured.warm_up = _warm_up(scene, subject.requests[options.candidates[0]], subject.slots, turns)
    measured.resident_mib["warm"] = _resident_mib(scene)
    for candidates in options.candidates:
        for delay_ms in options.delays_ms:
            cell = Cell(subject.requests[candidates], delay_ms / 1e3, options.seconds, subject.workload.seed)
            measured.round_trips_ms[cell.suffix] = _set_delay(scene, delay_ms)
            step(done, cell.title)
            rates = find_rates(scene, cell, turns)
            rounds = []
            for number in range(options.runs):
                done += 1
                step(done, f"{cell.title}, round {number + 1}")
                rounds.append(measure_round(scene, cell, rates, turns, number))
            measured.cells.append((cell, rounds))
            done += 1
    measured.resident_mib["end"] = _resident_mib(scene)


def _set_delay(scene: Scene, added_ms: float) -> dict[str, float]:
    """Have a question to the store take so much longer; what it takes without the proxy and with it, in ms.

    The proxy itself and waking it take 0.1 to 0.2 ms, which are part of what is added.
    """
    delay_ms, direct = added_ms, round_trip_ms(scene.redis.port)
    for _ in range(CALIBRATIONS):
        scene.proxy.set_delay(delay_ms / 1e3)
        delayed = round_trip_ms(scene.proxy.port)
        delay_ms = max(delay_ms - (delayed - direct - added_ms), 0.0)
    return {"direct": direct, "delayed": delayed}


def _warm_up(scene: Scene, requests: ZipfRequests, slots: int, turns: Turns) -> WarmUp:
    """All contestants get the same requests until nobody's hit rate moves any more."""
    stretch, place, rates = max(STRETCH * slots // requests.candidates, 8), turns.next(), dict[str, float]()
    until = time.monotonic() + WARM_SECONDS
    for number in range(MOST_STRETCHES):
        before = rates
        some = requests.encoded(place + number * stretch, stretch)
        rates = {server.contestant.name: _stretch(scene, server, some) for server in scene.servers}
        done = (number + 1) * stretch
        steady = bool(before) and all(abs(rates[name] - before[name]) < STEADY for name in rates)
        if steady or time.monotonic() > until:
            break
    return WarmUp(done, rates, steady)


def _stretch(scene: Scene, server: FeatureServer, requests: list[bytes]) -> float:
    """The hit rate over some requests."""
    before = server.figures()
    scene.warm(server, requests)
    return hit_rate(before, _settle(server))


def _settle(server: FeatureServer) -> ServerFigures:
    """The figures once nothing is fetched any more; at once where nothing is fetched behind requests."""
    until = time.monotonic() + SETTLE_SECONDS
    figures = server.figures()
    while server.contestant == ASYNC and time.monotonic() < until:
        time.sleep(SETTLE_STEP)
        before, figures = figures, server.figures()
        if figures.fetched == before.fetched:
            break
    return figures


def _resident_mib(scene: Scene) -> dict[str, float]:
    return {server.contestant.name: server.figures().resident_bytes / MIB for server in scene.servers}
