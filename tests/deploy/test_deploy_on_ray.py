"""Deployments on a real Ray of two nodes: faults and changes under load, and no request is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from rankd import Client, Ranker, RankRequest
from rankd.build.pack import BuildOptions, build_artifact
from rankd.deploy.deployment_status import DeploymentStatus, ProcessStatus
from rankd.deploy.process_report import ProcessReport, ProcessState
from rankd.embeddings.table_spec import TableStorage
from rankd.engine.backend import EngineConfig
from rankd.errors import RankdError
from rankd.models.protocol import create_model
from rankd.train.recipe import ModelChoice
from tests.deploy.ray_nodes import OTHER, RayNodes, two_nodes
from tests.features.stores.redis_server import eventually
from tests.train.small_log import RECIPE, small_dataset

DATASET = small_dataset()
USERS, ITEMS = DATASET.log.user_ids, DATASET.log.item_ids
REQUESTS = [RankRequest(user, (*ITEMS[:9], "unheard of", ITEMS[3])) for user in USERS[:5]]
PATIENCE_S = 90.0

DEPLOYMENT = """
name = "films"
models = "models"
plan = "two.json"
tables = "models/films/1/embeddings"
replicas = 2
servers = 1

[shard]
cpus = 0.5
memory = "64MiB"
workers = 1

[server]
memory = "256MiB"
config = "rankd.toml"

[watch]
every_seconds = 0.25
answer_seconds = 0.75
misses = 2
drain_seconds = 15
"""
SERVER = """
[engine]
executors = 1
[features.store]
url = "memory:"
[tables.client]
timeout_ms = 5000
"""


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
    for name, shards in (("two", "2"), ("four", "4")):
        command = ["plan", str(version), "--shards", shards, "--strategy", "load-balanced", "--replicate", "0"]
        rankd([*command, "--out", str(folder / f"{name}.json")], dict(os.environ))
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

    def status(self) -> DeploymentStatus:
        """How all is now."""
        return msgspec.json.decode(self.deploy("status", "--json"), type=DeploymentStatus)

    def report(self, name: str) -> ProcessReport:
        """How a process is."""
        (found,) = [process.report for process in self.status().processes if process.name == name]
        return found or ProcessReport(ProcessState.STARTING)

    def recovered(self, name: str, restarts: int) -> ProcessReport:
        """How a process is when it is up after so many restarts."""

        def up() -> ProcessReport | None:
            report = self.report(name)
            return report if report.state is ProcessState.UP and report.restarts >= restarts else None

        found: ProcessReport = eventually(up, f"{name} is up again", PATIENCE_S)
        return found

    def url(self) -> str:
        """Of the ranking server."""
        (server,) = [process for process in self.status().processes if process.shard is None]
        assert server.report is not None
        return f"http://{server.report.address}"


def rankd(arguments: list[str], environment: dict[str, str], folder: Path | None = None) -> str:
    """A command in a process of its own, as users type it; its output."""
    done = subprocess.run(
        [sys.executable, "-m", "rankd", *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
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
    left = subprocess.run(["pgrep", "-af", "rankd.deploy.leashed"], capture_output=True, text=True).stdout
    assert str(folder) not in left


class Load:
    """Requests all the time, each compared with the scores of a ranker that has all tables itself."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url, self._folder = url, folder
        self._stop = threading.Event()
        self.sent = 0
        self.wrong: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(2)]

    def __enter__(self) -> Load:
        with Ranker.load(self._folder / "models" / "films", EngineConfig(executors=1)) as ranker:
            self._expected = [ranker.rank(request).scores for request in REQUESTS]
        for thread in self._threads:
            thread.start()
        self.settle()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def settle(self, more: int = 20) -> None:
        """Until so many more requests were answered."""
        end = self.sent + more
        eventually(lambda: self.sent >= end, f"{more} more answers", PATIENCE_S)

    def _run(self, number: int) -> None:
        with Client(self._url) as client:
            while not self._stop.is_set():
                number = (number + 1) % len(REQUESTS)
                try:
                    answer = client.rank(REQUESTS[number])
                except RankdError as error:
                    self.wrong.append(f"{type(error).__name__}: {error}")
                    time.sleep(0.05)
                    continue
                if answer.degraded or not np.allclose(answer.scores, self._expected[number], atol=1e-4):
                    self.wrong.append(f"other scores, degraded {answer.degraded}")
                self.sent += 1
                time.sleep(0.005)


def test_up(deployed: Deployed, folder: Path) -> None:
    found = deployed.status()
    print(found)
    with Load(deployed.url(), folder) as load:
        load.settle()
    assert load.wrong == []
