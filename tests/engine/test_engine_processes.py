"""Executors in processes: the same results as on threads, and a process that dies or hangs takes nothing with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from rankd import Ranker, RankRequest
from rankd.engine.backend import EngineConfig, Isolation
from rankd.engine.processes.process_backend import ProcessBackend
from rankd.engine.processes.process_executor import ProcessExecutor
from rankd.engine.warming import Shapes
from rankd.errors import ArtifactError, ConfigError, EngineFailure
from rankd.schedule.schedule_config import ScheduleConfig
from rankd.states.state_config import StateConfig
from rankd.types import Event, Scores
from tests.features.stores.redis_server import eventually

APART = EngineConfig(executors=2, isolation=Isolation.PROCESSES)
HANG_SECONDS = 1.0
PATIENCE = 60.0
BOUND = 1e-5
"""Of logits: calls of other sizes add up in another order."""


@pytest.fixture(scope="module")
def apart(demo_models: Path) -> Iterator[Ranker]:
    """The packaged model on two processes."""
    with Ranker.load(demo_models / "demo", APART, schedule=ScheduleConfig(hang_seconds=HANG_SECONDS)) as ranker:
        yield ranker


def request(user: int, count: int) -> RankRequest:
    """One of a user of the packaged model."""
    return RankRequest(f"user-{user:04d}", tuple(f"film-{number:04d}" for number in range(1, count + 1)))


def same(one: Scores, other: Scores) -> bool:
    """Whether two answers have the same scores, however they were cut and packed."""
    return bool(np.abs(one.scores - other.scores).max() <= BOUND)


def executor_of(ranker: Ranker) -> ProcessExecutor:
    """One that works now."""
    executor = ranker.schedule.executors[-1]
    assert isinstance(executor, ProcessExecutor)
    return executor


def running(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("count", [1, 7, 60, 200])
def test_scores_are_those_of_an_engine_on_threads(apart: Ranker, demo_ranker: Ranker, count: int) -> None:
    for user in (3, 4, 9999):
        here, there = demo_ranker.rank(request(user, count)), apart.rank(request(user, count))
        assert same(here, there)
        again = apart.rank(request(user, count))
        assert (same(here, again), again.state) == (True, "cached")


def test_several_users_in_a_call_and_arrays_that_are_not_shared(apart: Ranker, demo_ranker: Ranker) -> None:
    there, here = apart.backend.executor(), demo_ranker.backend.executor()
    try:
        made = Shapes(demo_ranker.manifest, demo_ranker.backend.state_type)
        room, rng = made.rooms[-1], np.random.default_rng(5)
        history = made.history(room)
        history["history_length"][...] = room
        history["history_item"][...] = rng.integers(1, 50, history["history_item"].shape)
        candidates = made.candidates(16, 2)
        candidates["candidate_item"][...] = rng.integers(1, 50, candidates["candidate_item"].shape)
        states = []
        for executor in (here, there):
            full = made.full(room)
            executor.encode(history, full.arrays)
            states.append(full)
        for name, array in states[0].arrays.items():
            np.testing.assert_array_equal(array, states[1].arrays[name])
            np.testing.assert_array_equal(array, there.encode(history)[name])
        nobody, new = made.state(room), made.history(8)
        new["history_length"][...] = 5
        added = {name: array.copy() for name, array in here.extend(nobody, new).items()}
        for name, array in there.extend(nobody, new).items():
            np.testing.assert_array_equal(array, added[name])
        both = (states[0], nobody)
        np.testing.assert_array_equal(here.score(both, candidates), there.score(both, candidates))
    finally:
        there.close()


def test_events_are_appended_to_states_that_a_process_made(demo_models: Path) -> None:
    with Ranker.load(demo_models / "demo", APART) as ranker, Ranker.load(demo_models / "demo") as plain:
        for each in (ranker, plain):
            each.rank(request(6, 5))
            each.append_events("user-0006", (Event("film-0009"), Event("film-0010")))
        there, here = ranker.rank(request(6, 30)), plain.rank(request(6, 30))
        assert (there.state, same(there, here)) == (here.state, True)


def test_a_process_that_is_killed_costs_no_request(apart: Ranker, demo_ranker: Ranker) -> None:
    before = apart.schedule_figures().counts.lost_executors
    futures: list[tuple[RankRequest, Future[Scores]]] = []
    for number in range(120):
        if number == 40:
            os.kill(executor_of(apart).pid, signal.SIGKILL)
        one = request(number % 50, 1 + 7 * number % 150)
        futures.append((one, apart.submit(one)))
    for asked, future in futures:
        assert same(future.result(PATIENCE), demo_ranker.rank(asked))
    _until_both_work(apart, before + 1)


def test_a_process_that_hangs_is_ended_and_its_work_done_again(apart: Ranker, demo_ranker: Ranker) -> None:
    _until_both_work(apart, before := apart.schedule_figures().counts.lost_executors)
    pid = executor_of(apart).pid
    os.kill(pid, signal.SIGSTOP)
    futures = [(one, apart.submit(one)) for one in (request(number, 40) for number in range(100, 130))]
    for asked, future in futures:
        assert same(future.result(PATIENCE), demo_ranker.rank(asked))
    eventually(lambda: not running(pid), "the stopped process was ended")
    _until_both_work(apart, before + 1)


def _until_both_work(ranker: Ranker, lost: int) -> None:
    eventually(lambda: ranker.schedule_figures().counts.lost_executors == lost, "the loss was noticed")
    eventually(
        lambda: sum(isinstance(one, ProcessExecutor) and running(one.pid) for one in ranker.schedule.executors) == 2,
        "another process took its place",
    )


def test_an_engine_that_cannot_start_says_why_and_leaves_no_process(tmp_path: Path, demo_ranker: Ranker) -> None:
    before = set(_children())
    missing = type(demo_ranker.artifact)(tmp_path, demo_ranker.manifest)
    with pytest.raises(ArtifactError, match="no model version here"):
        ProcessBackend(missing, APART, None)
    assert set(_children()) <= before


def test_a_closed_executor_fails_by_name(apart: Ranker) -> None:
    executor, shapes = apart.backend.executor(), Shapes(apart.manifest, apart.backend.state_type)
    executor.close()
    executor.close()
    with pytest.raises(EngineFailure, match="engine process"):
        executor.score([shapes.state(shapes.rooms[0])], shapes.candidates(16, 1))


OWNER = """
import sys, time
from rankd import Ranker
from rankd.engine.backend import EngineConfig, Isolation
ranker = Ranker.load(sys.argv[1], EngineConfig(executors=1, isolation=Isolation.PROCESSES))
print(ranker.schedule.executors[0].pid, flush=True)
time.sleep(600)
"""


def test_processes_end_with_the_ranker_that_was_killed(demo_models: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(demo_models / "demo")], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert running(pid)
        os.kill(pid, signal.SIGTERM)  # a signal to the whole group: the ranker still needs its executors
        os.kill(pid, signal.SIGINT)
        assert running(pid)
        owner.kill()
    eventually(lambda: not running(pid), "the engine's process has ended")


def test_no_states_are_kept_and_still_everything_is_right(demo_models: Path, demo_ranker: Ranker) -> None:
    with Ranker.load(demo_models / "demo", APART, states=StateConfig(budget_mib=0)) as ranker:
        assert same(ranker.rank(request(8, 33)), demo_ranker.rank(request(8, 33)))


def _children() -> list[int]:
    task = Path(f"/proc/{os.getpid()}/task")
    return [int(pid) for thread in task.iterdir() for pid in (thread / "children").read_text().split()]


def test_a_ranker_that_cannot_be_made_leaves_no_process(demo_models: Path) -> None:
    before = set(_children())
    with pytest.raises(ConfigError, match="states"):
        Ranker.load(demo_models / "demo", APART, states=StateConfig(spill="/dev/null/nowhere"))
    assert set(_children()) <= before
