"""Deployments on a real Ray of two nodes: faults and changes under load, and no request is lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from rankd import Client, Ranker, RankRequest
from rankd.build.pack import BuildOptions, build_artifact
from rankd.cli import rankd as commands
from rankd.deploy.deployment_status import DeploymentStatus
from rankd.deploy.process_report import ProcessReport, ProcessState
from rankd.embeddings.table_spec import TableStorage
from rankd.engine.backend import EngineConfig
from rankd.errors import RankdError
from rankd.models.protocol import create_model
from rankd.train.recipe import ModelChoice
from rankd.types import Float32Array
from tests.deploy.ill_shards import in_its_place, ten_times_slower
from tests.deploy.ray_nodes import HEAD, OTHER, RayNodes, two_nodes
from tests.features.stores.redis_server import eventually
from tests.train.small_log import RECIPE, small_dataset

DATASET = small_dataset()
USERS, ITEMS = DATASET.log.user_ids, DATASET.log.item_ids
REQUESTS = [RankRequest(user, (*ITEMS[:9], "unheard of", ITEMS[3])) for user in USERS[:5]]
PATIENCE_S = 180.0

DEPLOYMENT = """
name = "films"
models = "models"
plan = "two.json"
tables = "models/films/1/embeddings"
replicas = 2
servers = 1

[shard]
cpus = 0.25
memory = "64MiB"
workers = 1

[server]
memory = "2GiB"  # more than the second node has
config = "rankd.toml"

[watch]
every_seconds = 0.25
answer_seconds = 1.5
misses = 2
drain_seconds = 15
room_seconds = 2
"""
SERVER = """
[engine]
executors = 1
[features.store]
url = "memory:"
[tables.client]
timeout_ms = 30000
heartbeat_seconds = 2
"""
LONGEST_S = 60.0
"""Of a request: what is to be found is a lost one, not a busy machine."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, plans of 2 and of 4 shards, and the files of a deployment."""
    folder = tmp_path_factory.mktemp("deployment")
    torch.manual_seed(1)
    model = create_model("dlrm", DATASET.schema, {})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    recipe = msgspec.structs.replace(RECIPE, model=ModelChoice("dlrm", {}))
    options = BuildOptions("films", "1", tables=TableStorage.FP32)
    version = build_artifact(folder / "models", model.eval(), DATASET, recipe, options)
    for name, shards, strategy in (("two", 2, "load"), ("four", 4, "load"), ("older", 2, "capacity")):
        command = ["plan", str(version), "--shards", str(shards), "--strategy", f"{strategy}-balanced"]
        more = ["--replicate", "0", "--out", str(folder / f"{name}.json")]
        CliRunner().invoke(commands, [*command, *more], catch_exceptions=False)
    (folder / "films.toml").write_text(DEPLOYMENT)
    (folder / "rankd.toml").write_text(SERVER)
    return folder


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    """Ray."""
    with two_nodes() as started:
        yield started


class Deployed:
    """The deployment as its users see it: commands and requests."""

    def __init__(self, nodes: RayNodes, folder: Path) -> None:
        self._nodes, self._folder = nodes, folder

    def deploy(self, *arguments: str) -> str:
        """`rankd deploy ...`; its output."""
        return rankd(["deploy", *arguments, "--ray", self._nodes.address], self._nodes.environment, self._folder)

    def processes(self) -> dict[str, ProcessReport]:
        """How each process is now that answers."""
        found = msgspec.json.decode(self.deploy("status", "--json"), type=DeploymentStatus)
        return {process.name: process.report for process in found.processes if process.report is not None}

    def up_again(self, name: str, since: ProcessReport) -> ProcessReport:
        """How a process is when it is up, and another one than `since`."""

        def up() -> ProcessReport | None:
            report = self.processes().get(name)
            return report if report and report.state is ProcessState.UP and report.pid != since.pid else None

        found: ProcessReport = eventually(up, f"{name} is up again", PATIENCE_S)
        return found

    def url(self) -> str:
        """Of the ranking server."""
        (server,) = [report for name, report in self.processes().items() if name.startswith("server")]
        return f"http://{server.address}"


def rankd(arguments: list[str], environment: dict[str, str], folder: Path | None = None) -> str:
    """A command in a process of its own, as users type it; its output."""
    done = subprocess.run(
        [sys.executable, "-m", "rankd", *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"rankd {' '.join(arguments)}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def deployed(nodes: RayNodes, folder: Path) -> Iterator[Deployed]:
    """Up, with two shards of two replicas and a ranking server."""
    running = Deployed(nodes, folder)
    running.deploy("up", "films.toml")
    yield running
    running.deploy("down", "films")
    eventually(lambda: not nodes.processes("rankd.deploy.leashed"), "no process is left", PATIENCE_S)


class Load:
    """Requests all the time, each compared with `expected` scores; `took_ms` of those that were answered."""

    def __init__(self, url: str, expected: list[Float32Array]) -> None:
        self.url, self._expected = url, expected
        self._stop = threading.Event()
        self.sent = 0
        self.took_ms: list[float] = []
        self.wrong: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(2)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.settle()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def settle(self, more: int = 10) -> None:
        """Until so many more requests were answered."""
        end = self.sent + more
        eventually(lambda: self.sent >= end, f"{more} more answers", PATIENCE_S)

    def calls(self, what: str) -> int:
        """How many calls of shards became that (`client_counts.Counted`) so far."""
        found = re.findall(rf'rankd_shard_calls_total{{.*what="{what}"}} (\S+)', httpx.get(f"{self.url}/metrics").text)
        return int(sum(map(float, found)))

    def replicas(self) -> int:
        """How many replicas of all shards can be asked."""
        found = re.findall(r"rankd_shard_replicas{.*} (\S+)", httpx.get(f"{self.url}/metrics").text)
        return int(sum(map(float, found)))

    def affected(self, before: int, fault: str) -> str:
        """What the requests since the first `before` saw."""
        during = self.took_ms[before:]
        counts = ", ".join(f"{self.calls(what)} {what}" for what in ("hedged", "retried", "failed"))
        return (
            f"{fault}: {len(during)} requests answered, at most {max(during):.0f} ms, median {np.median(during):.0f} "
            f"(before: {np.median(self.took_ms[:before]):.0f}); {len(self.wrong)} lost; calls so far: {counts}"
        )

    def _run(self, number: int) -> None:
        with Client(self.url, LONGEST_S) as client:
            while not self._stop.is_set():
                number = (number + 1) % len(REQUESTS)
                begun = time.perf_counter()
                try:
                    answer = client.rank(REQUESTS[number])
                except RankdError as error:
                    self.wrong.append(f"{type(error).__name__}: {error}")
                    time.sleep(0.05)
                    continue
                if answer.degraded or not np.allclose(answer.scores, self._expected[number], atol=1e-4):
                    self.wrong.append(f"other scores, degraded {answer.degraded}")
                self.took_ms.append((time.perf_counter() - begun) * 1e3)
                self.sent += 1
                time.sleep(0.03)  # this machine starts processes too


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[Float32Array]:
    """The scores of a ranker that has all tables itself."""
    with Ranker.load(folder / "models" / "films", EngineConfig(executors=1)) as ranker:
        return [ranker.rank(request).scores for request in REQUESTS]


@pytest.fixture
def load(deployed: Deployed, expected: list[Float32Array]) -> Iterator[Load]:
    """Requests while the test runs; at its end none was lost, and all had the right scores."""
    with Load(deployed.url(), expected) as running:
        yield running
        running.settle()
    assert running.wrong == []


def running(report: ProcessReport) -> bool:
    """Whether that process is still there."""
    return Path(f"/proc/{report.pid}").exists()


def shards_of(processes: dict[str, ProcessReport], number: int) -> dict[str, ProcessReport]:
    return {name: report for name, report in processes.items() if name.startswith(f"shard-{number}-")}


def test_replicas_of_a_shard_are_on_different_nodes(deployed: Deployed, load: Load) -> None:
    processes = deployed.processes()
    for number in (0, 1):
        assert {report.host for report in shards_of(processes, number).values()} == {HEAD, OTHER}


def test_shards_that_die_or_hang_are_replaced_and_no_request_is_lost(deployed: Deployed, load: Load) -> None:
    processes = deployed.processes()
    faults = {
        next(iter(shards_of(processes, number))): fault for number, fault in ((0, signal.SIGKILL), (1, signal.SIGSTOP))
    }
    for name, fault in faults.items():
        os.kill(processes[name].pid, fault)
    for name, fault in faults.items():
        before = processes[name]
        after = deployed.up_again(name, before)
        assert (after.address, after.restarts) == (before.address, before.restarts + 1)
        assert after.recovery_s is not None
        assert ("SIGKILL" if fault is signal.SIGKILL else "did not answer 2 times") in after.trouble
        print(f"{fault.name}: away {after.recovery_s:.2f} s, {load.sent} requests answered, {len(load.wrong)} lost")


def test_a_shard_that_is_ten_times_slower_costs_hedges_and_is_left_alone(deployed: Deployed, load: Load) -> None:
    name, shard = next(iter(shards_of(deployed.processes(), 0).items()))
    load.settle(60)  # so that it is known what calls take
    before, hedged = load.sent, load.calls("hedged")
    with ten_times_slower(shard.pid):
        eventually(lambda: load.calls("hedged") > hedged, "calls were sent to the other replica too", PATIENCE_S)
        load.settle(60)
        print(load.affected(before, "ten times slower"))
    assert load.calls("failed") == 0
    after = deployed.processes()[name]
    assert (after.pid, after.restarts) == (shard.pid, shard.restarts)


def test_a_shard_that_sends_garbage_is_replaced_and_no_request_is_lost(deployed: Deployed, load: Load) -> None:
    name, shard = next(iter(shards_of(deployed.processes(), 1).items()))
    before = load.sent
    os.kill(shard.pid, signal.SIGUSR1)
    after = deployed.up_again(name, shard)
    print(load.affected(before, f"garbage, away {after.recovery_s:.2f} s"))
    assert (after.address, after.restarts) == (shard.address, shard.restarts + 1)
    assert "answered wrongly" in after.trouble
    assert load.calls("failed") == 0


def test_an_older_shard_at_the_address_is_not_asked_and_the_right_one_comes_back(
    deployed: Deployed, folder: Path, load: Load
) -> None:
    here = {name: one for name, one in shards_of(deployed.processes(), 1).items() if one.host == HEAD}
    ((name, shard),) = here.items()
    before = load.sent
    with in_its_place(shard, folder / "older.json", until="this shard has plan") as said:
        assert "this shard has plan" in said[-1], "it was found and did not let us in"
        load.settle()
        after = deployed.up_again(name, shard)
        assert after.address != shard.address, "it is taken"
        eventually(lambda: load.replicas() == 4, "it is asked again, where it is now", PATIENCE_S)
        print(load.affected(before, f"an older plan, away {after.recovery_s:.2f} s"))
    assert load.calls("failed") == 0


def test_a_supervisor_that_dies_takes_its_shard_along_and_ray_starts_both_again(
    deployed: Deployed, nodes: RayNodes, load: Load
) -> None:
    name, before = next(iter(shards_of(deployed.processes(), 1).items()))
    agent = int(Path(f"/proc/{before.pid}/stat").read_text().rpartition(")")[2].split()[1])
    (controller,) = nodes.processes("ray::ControllerActor")
    os.kill(agent, signal.SIGKILL)
    os.kill(controller, signal.SIGKILL)
    eventually(lambda: not running(before), "the shard has ended too")
    deployed.up_again(name, before)
    assert nodes.processes("ray::ControllerActor") not in ([], [controller])


def test_replicas_go_and_ranking_servers_come(deployed: Deployed, load: Load, expected: list[Float32Array]) -> None:
    deployed.deploy("scale", "--replicas", "1", "--servers", "2")
    processes = deployed.processes()
    assert [len(shards_of(processes, number)) for number in (0, 1)] == [1, 1]
    (newest,) = [report for name, report in processes.items() if report.address not in load.url and "server" in name]
    with Load(f"http://{newest.address}", expected) as other:
        other.settle()
    assert other.wrong == []
    deployed.deploy("scale", "--servers", "1")
    assert len(deployed.processes()) == 3
    assert not running(newest)


def test_a_plan_grows_from_two_shards_to_four(deployed: Deployed, load: Load) -> None:
    before = deployed.processes()
    deployed.deploy("apply", "four.json")
    after = deployed.processes()
    assert [len(shards_of(after, number)) for number in range(4)] == [1, 1, 1, 1]
    gone = set(before) - set(after)
    assert gone == {name for name in before if name.startswith("shard")}
    assert not [name for name in gone if running(before[name])]


def test_a_node_is_drained(deployed: Deployed, load: Load) -> None:
    assert OTHER in {report.host for report in deployed.processes().values()}
    deployed.deploy("drain", "--node", OTHER)
    after = deployed.processes()
    assert {report.host for report in after.values()} == {HEAD}
    assert [len(shards_of(after, number)) for number in range(4)] == [1, 1, 1, 1]


def test_a_node_that_ends_costs_no_request_and_its_shards_come_back_with_it(
    deployed: Deployed, nodes: RayNodes, load: Load
) -> None:
    deployed.deploy("scale", "--replicas", "2")
    before = {name: report for name, report in deployed.processes().items() if report.host == OTHER}
    assert sorted(name[:7] for name in before) == ["shard-0", "shard-1", "shard-2", "shard-3"]
    nodes.end(OTHER)
    eventually(lambda: not any(map(running, before.values())), "all that was there has ended", PATIENCE_S)
    load.settle()
    nodes.start_other()
    for name, report in before.items():
        deployed.up_again(name, report)


def test_wrong_changes_are_refused_and_change_nothing(deployed: Deployed) -> None:
    before = set(deployed.processes())
    for arguments, message in (
        (("up", "films.toml"), "is there already"),
        (("drain", "shard-9-9"), "no process 'shard-9-9' here"),
        (("scale", "--servers", "5"), "no room for server-"),
        (("down", "fims"), "Did you mean 'films'?"),
    ):
        with pytest.raises(AssertionError, match=re.escape(message)):
            deployed.deploy(*arguments)
    assert set(deployed.processes()) == before
