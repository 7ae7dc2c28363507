"""A Ray of this machine alone: `rankd deploy up --ray local`, and nothing of it is left after `down`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
import pytest

from rankd.deploy.deployment_status import DeploymentStatus
from rankd.deploy.process_report import ProcessState
from rankd.embeddings.table_writing import write_table
from rankd.plan.plan_file import FORMAT, PlanFile
from rankd.plan.strategies import make_plan
from rankd.plan.table_plan import MemoryLimits, Strategy
from tests.deploy.ray_nodes import own_namespace
from tests.plan.made_up import load_of

LOAD = load_of("item", 20)
DEPLOYMENT = """
name = "alone"
models = "."
plan = "plan.json"
tables = "."
servers = 0
shard.cpus = 0.5
shard.memory = "64MiB"
"""


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Of commands: what Ray writes is not where others look."""
    with ExitStack() as stack:
        stack.enter_context(own_namespace())
        short = stack.enter_context(tempfile.TemporaryDirectory(prefix="rankd-ray-", ignore_cleanup_errors=True))
        (tmp_path / "token").write_text("0123456789abcdef" * 4)
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
        yield {**os.environ, **token, "RAY_TMPDIR": short}


def test_a_ray_of_this_machine_alone(tmp_path: Path, environment: dict[str, str]) -> None:
    write_table(tmp_path, LOAD.spec, [np.ones((20, LOAD.spec.dim), np.float32)])
    plan = make_plan(Strategy.ONE_SHARD, [LOAD], 1, MemoryLimits(replicate_bytes=0))
    (tmp_path / "plan.json").write_bytes(msgspec.json.encode(PlanFile(FORMAT, "films", (), plan)))
    (tmp_path / "alone.toml").write_text(DEPLOYMENT)

    def deploy(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rankd", "deploy", *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    assert "`rankd deploy up --ray local`" in " ".join(deploy("status").stderr.split())
    up = deploy("up", "alone.toml", "--ray", "local")
    assert up.returncode == 0, up.stderr
    found = msgspec.json.decode(deploy("status", "--json").stdout, type=DeploymentStatus)
    (shard,) = [process.report for process in found.processes]
    assert shard is not None
    assert shard.state is ProcessState.UP
    assert shard.address in up.stdout
    assert found.ray_pid
    down = deploy("down")
    assert (down.returncode, down.stdout) == (0, "alone is down\n"), down.stderr
    assert not Path(f"/proc/{shard.pid}").exists()
    assert not Path(f"/proc/{found.ray_pid}").exists()
