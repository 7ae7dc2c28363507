"""A Ray of this machine alone: `rankd deploy up --ray local`, and nothing of it is left after the last `down`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from rankd.deploy import local_ray
from rankd.deploy.deployment_status import DeploymentStatus
from rankd.deploy.process_report import ProcessReport, ProcessState
from rankd.embeddings.table_writing import write_table
from rankd.errors import Unavailable
from rankd.plan.plan_file import FORMAT, PlanFile
from rankd.plan.strategies import make_plan
from rankd.plan.table_plan import MemoryLimits, Strategy
from tests.deploy.ray_nodes import QUICK, _namespace, own_namespace
from tests.features.stores.redis_server import eventually
from tests.plan.made_up import load_of

# What is started is meant to outlive the object that stands for it
pytestmark = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")

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
        yield {**os.environ, **QUICK, **token, "RAY_TMPDIR": short}


def rays() -> list[int]:
    """The Rays of this machine alone in this thread's namespace."""
    found = subprocess.run(["pgrep", "-f", "start --head --block"], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found if _namespace(pid) == _namespace("thread-self")]


CONTROLLER_FAILS = """
import sys
import ray
from rankd.deploy import ray_session
ray_session.connect("auto")
ray.kill(ray_session.find_controller(sys.argv[1])[1], no_restart=True)
"""


def test_a_ray_of_this_machine_alone(tmp_path: Path, environment: dict[str, str]) -> None:
    write_table(tmp_path, LOAD.spec, [np.ones((20, LOAD.spec.dim), np.float32)])
    plan = make_plan(Strategy.ONE_SHARD, [LOAD], 1, MemoryLimits(replicate_bytes=0))
    (tmp_path / "plan.json").write_bytes(msgspec.json.encode(PlanFile(FORMAT, "films", (), plan)))
    for name in ("alone", "second"):
        (tmp_path / f"{name}.toml").write_text(DEPLOYMENT.replace("alone", name))

    def python(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        own = {**environment, **more}
        return subprocess.run(command, env=own, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    def deploy(*arguments: str, **more: str) -> str:
        done = python("-m", "rankd", "deploy", *arguments, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def shard(name: str) -> ProcessReport:
        found = msgspec.json.decode(deploy("status", name, "--json"), type=DeploymentStatus)
        (report,) = [process.report for process in found.processes]
        assert report is not None
        assert report.state is ProcessState.UP
        return report

    refused = python("-m", "rankd", "deploy", "status")
    assert "`rankd deploy up --ray local`" in " ".join(refused.stderr.split())
    up = deploy("up", "alone.toml", "--ray", "local", RAY_ADDRESS="127.0.0.1:1")
    first = shard("alone")
    assert first.host == "127.0.0.1", "nobody else reaches it"
    assert os.getpriority(os.PRIO_PROCESS, first.pid) == os.getpriority(os.PRIO_PROCESS, 0), "Ray would lower it"
    assert first.address in up
    deploy("up", "second.toml")
    second = shard("second")
    (ray,) = rays()
    assert python("-c", CONTROLLER_FAILS, "alone").returncode == 0
    deploy("up", "alone.toml")
    again = shard("alone")
    assert again.pid != first.pid, "an old record and its processes are not taken over"
    assert not Path(f"/proc/{first.pid}").exists()
    assert deploy("down", "alone") == "alone is down\n"
    assert rays() == [ray], "there is another deployment on it"
    assert shard("second").pid == second.pid
    assert python("-c", CONTROLLER_FAILS, "second").returncode == 0
    assert deploy("down", "second") == "second is down\n"
    for pid in (again.pid, second.pid):
        assert not Path(f"/proc/{pid}").exists()
    eventually(lambda: not Path(f"/proc/{ray}").exists(), "Ray has ended, and whoever is to has noticed it")


FAKE_RAY = """#!{python}
import os, signal, sys, time
from pathlib import Path
folder = Path("{folder}")
if sys.argv[1] == "get-auth-token":
    token = Path.home() / ".ray" / "auth_token"
    token.parent.mkdir(exist_ok=True)
    token.write_text("secret")
    sys.exit()
signal.signal(signal.SIGINT, lambda *_: sys.exit())
(folder / "pid").write_text(str(os.getpid()))
if "{starts}" == "True":
    print("Ray runtime started", flush=True)
time.sleep(120)
"""


@pytest.fixture
def fake_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Puts another program in Ray's place, which starts or hangs; home and temporary files are in `tmp_path`."""

    def put(starts: bool) -> None:
        program = tmp_path / "ray"
        program.write_text(FAKE_RAY.format(python=sys.executable, folder=tmp_path, starts=starts))
        program.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        monkeypatch.setattr(local_ray, "find_spec", lambda name: True)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("RAY_AUTH_MODE", "token")  # so that it is put back
        monkeypatch.delenv("RAY_AUTH_MODE")

    return put


def test_a_start_that_is_interrupted_leaves_nothing(
    tmp_path: Path, fake_ray: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_ray(False)

    def interrupted(*_: object) -> None:
        eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "it starts")
        raise KeyboardInterrupt

    monkeypatch.setattr(local_ray, "_wait_started", interrupted)
    with pytest.raises(KeyboardInterrupt):
        local_ray.start_local()
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()
    assert list(tmp_path.glob("rankd-ray-*")) == []


def test_a_start_that_takes_too_long_keeps_its_log(
    tmp_path: Path, fake_ray: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_ray(False)
    monkeypatch.setattr(local_ray, "START_S", 0.2)
    with pytest.raises(Unavailable, match=f"Ray did not start; {tmp_path}/rankd-ray-"):
        local_ray.start_local()
    assert len(list(tmp_path.glob("rankd-ray-*"))) == 1


@pytest.mark.parametrize("before", [None, 0o644])
def test_the_token_is_for_nobody_else(tmp_path: Path, fake_ray: Callable[[bool], None], before: int | None) -> None:
    fake_ray(True)
    token = tmp_path / ".ray" / "auth_token"
    if before is not None:
        token.parent.mkdir()
        token.touch(before)
    local_ray.stop_local(local_ray.start_local())
    assert token.stat().st_mode & 0o777 == 0o600
    assert os.environ["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize(
    ("address", "token", "said", "shown"),
    [
        ("127.0.0.1:6379", True, None, "token"),
        ("localhost:6379", True, None, "token"),
        ("127.0.0.1:6379", False, None, None),
        ("127.0.0.1:6379", True, "disabled", "disabled"),
        ("10.0.0.7:6379", True, None, None),
        ("auto", True, None, None),
    ],
)
def test_our_token_is_shown_to_a_ray_of_this_machine(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    token: bool,
    said: str | None,
    shown: str | None,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", said or "")  # so that it is put back
    if said is None:
        monkeypatch.delenv("RAY_AUTH_MODE")
    if token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("secret")
    local_ray.show_token(address)
    assert os.environ.get("RAY_AUTH_MODE") == shown


def test_only_the_process_that_was_started_is_ended(
    tmp_path: Path, fake_ray: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_ray(True)
    ray = local_ray.start_local()
    running = Path(f"/proc/{ray.pid}")
    with pytest.raises(Unavailable, match="runs on elsewhere"):
        local_ray.stop_local(replace(ray, host="elsewhere"))
    local_ray.stop_local(replace(ray, began=ray.began + 1, log=""))  # its number was given to another one
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", not_permitted)
        with pytest.raises(Unavailable, match="somebody else's"):
            local_ray.stop_local(ray)
    assert running.exists()
    local_ray.stop_local(ray)
    assert not running.exists()
    assert not Path(ray.log).exists()
    local_ray.stop_local(ray)


def not_permitted(*_: int) -> None:
    raise PermissionError
