"""A supervisor and a real shard: killed, hung, or unable to start, it is started again and says so."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
import pytest

from rankd.deploy.deployment import Watching
from rankd.deploy.process_report import ProcessReport, ProcessState
from rankd.deploy.roles import PLACEMENT, Prober, Role, ServerRole, ShardRole, _generation, _ServerProber
from rankd.deploy.supervisor import Supervisor, _free_port
from rankd.embeddings.table_writing import write_table
from rankd.errors import Unavailable
from rankd.plan.plan_file import FORMAT, PlanFile
from rankd.plan.strategies import make_plan
from rankd.plan.table_plan import MemoryLimits, Strategy
from rankd.shards.placement_file import Placement, read_placement, write_placement
from rankd.shards.shard_config import ShardSecurity
from tests.features.stores.redis_server import eventually
from tests.free_ports import free_port
from tests.plan.made_up import load_of

LOAD = load_of("item", 20)
PLAN = PlanFile(FORMAT, "films", (), make_plan(Strategy.ONE_SHARD, [LOAD], 1, MemoryLimits(replicate_bytes=0)))
WATCHING = Watching(every_seconds=0.1, answer_seconds=0.5, misses=2, start_seconds=30.0)
HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    write_table(folder, LOAD.spec, [np.ones((20, LOAD.spec.dim), np.float32)])
    return folder


def role(tables: Path, **changes: int) -> ShardRole:
    secret = ShardSecurity(secret="sixteen letters long")
    port = free_port()
    return ShardRole(PLAN, changes.get("number", 0), str(tables), 1, "", secret, (port, port))


@pytest.fixture
def supervisor(tables: Path) -> Iterator[Supervisor]:
    made = Supervisor(role(tables), WATCHING, HOST, "n1")
    made.start()
    yield made
    made.stop(5.0)


def up(supervisor: Supervisor, restarts: int = 0) -> ProcessReport:
    def now() -> ProcessReport | None:
        report = supervisor.report()
        return report if report.state is ProcessState.UP and report.restarts == restarts else None

    found: ProcessReport = eventually(now, f"the shard is up after {restarts} restarts", 30.0)
    return found


def test_a_shard_that_is_killed_or_hangs_is_started_again_where_it_was(supervisor: Supervisor) -> None:
    first = up(supervisor)
    assert (first.node, first.host, first.recovery_s) == ("n1", HOST, None)
    os.kill(first.pid, signal.SIGKILL)
    second = up(supervisor, 1)
    assert second.pid != first.pid
    assert "SIGKILL" in second.trouble
    assert second.recovery_s is not None
    os.kill(second.pid, signal.SIGSTOP)
    eventually(lambda: supervisor.report().state is ProcessState.SILENT, "it is missed")
    third = up(supervisor, 2)
    assert "did not answer 2 times in a row" in third.trouble
    assert not Path(f"/proc/{second.pid}").exists()
    assert first.address == second.address == third.address
    assert third.recovery_s is not None
    assert third.recovery_s > WATCHING.answer_seconds, "counted from when it was missed first"


def test_a_pause_that_ends_is_forgiven(supervisor: Supervisor) -> None:
    before = up(supervisor)
    os.kill(before.pid, signal.SIGSTOP)
    eventually(lambda: supervisor.report().state is ProcessState.SILENT, "it is missed")
    os.kill(before.pid, signal.SIGCONT)
    assert up(supervisor).pid == before.pid


def test_stopping_ends_the_process_and_leaves_nothing(tables: Path) -> None:
    supervisor = Supervisor(role(tables), WATCHING, HOST)
    supervisor.start()
    report = up(supervisor)
    assert (supervisor.folder / "log").exists()
    supervisor.stop(10.0)
    assert supervisor.report().state is ProcessState.ENDED
    assert not Path(f"/proc/{report.pid}").exists()
    assert not supervisor.folder.exists()


def test_a_hung_process_is_ended_when_its_time_is_over(tables: Path) -> None:
    supervisor = Supervisor(role(tables), WATCHING, HOST)
    supervisor.start()
    report = up(supervisor)
    os.kill(report.pid, signal.SIGSTOP)
    supervisor.stop(0.1)
    assert not Path(f"/proc/{report.pid}").exists()


SLOW_TO_GO = """#!{python}
import signal, sys, time
from pathlib import Path
from rankd.deploy.leashed import hold_to

def go(*_):
    Path("{folder}", "drains").touch()
    time.sleep({needs_s})
    Path("{folder}", "drained").touch()
    sys.exit()

hold_to(int(sys.argv[3]))
signal.signal(signal.SIGTERM, go)
Path("{folder}", "ready").touch()
while True:
    signal.pause()
"""


class SlowToGo:
    """The role of a process that is held as ours are, is not ready any more once it drains, and takes its time."""

    ports, num_ports = (0, 0), 1

    def __init__(self, folder: Path, needs_s: float) -> None:
        self._folder = folder
        self.program = folder / "python"
        self.program.write_text(SLOW_TO_GO.format(python=sys.executable, folder=folder, needs_s=needs_s))
        self.program.chmod(0o700)

    def prepare(self, folder: Path) -> None:
        return

    def command(self, folder: Path, host: str, port: int) -> list[str]:
        return []

    def variables(self, folder: Path) -> dict[str, str]:
        return {}

    def prober(self, address: str) -> Prober:
        return self

    def probe(self, within_s: float) -> int:
        if not (self._folder / "ready").exists() or (self._folder / "drains").exists():
            raise Unavailable("not ready")
        return 0

    def close(self) -> None:
        return


@pytest.mark.parametrize(("needs_s", "drain_seconds"), [(1.5, 30.0), (60.0, 1.0)])
def test_a_process_that_drains_has_all_of_its_time_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs_s: float, drain_seconds: float
) -> None:
    """It is missed soon, and would end with the thread that started it."""
    slow = SlowToGo(tmp_path, needs_s)
    monkeypatch.setattr(sys, "executable", str(slow.program))
    supervisor = Supervisor(cast(Role, slow), WATCHING, HOST)
    supervisor.start()
    report = up(supervisor)
    begun = time.perf_counter()
    supervisor.stop(drain_seconds)
    assert (tmp_path / "drained").exists() == (needs_s < drain_seconds)
    assert time.perf_counter() - begun < 20.0
    assert not Path(f"/proc/{report.pid}").exists()


def test_a_prober_that_fails_does_not_end_the_supervision(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = ShardRole.prober, []

    def fails_once(role: ShardRole, address: str) -> Prober:
        asked.append(address)
        if len(asked) == 1:
            raise ValueError("a fault of ours")
        return real(role, address)

    monkeypatch.setattr(ShardRole, "prober", fails_once)
    supervisor = Supervisor(role(tables), WATCHING, HOST)
    supervisor.start()
    try:
        assert "could not be supervised: ValueError: a fault of ours" in up(supervisor, 1).trouble
    finally:
        supervisor.stop(5.0)


@pytest.mark.parametrize(
    ("status", "text", "complaint"), [(500, "oops", "answers 500"), (200, "{oops", "unreadable metrics")]
)
def test_a_server_without_figures_is_not_well(status: int, text: str, complaint: str) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            ready = self.path == "/health/ready"
            self.send_response(200 if ready else status)
            self.end_headers()
            self.wfile.write(b"" if ready else text.encode())

        def log_message(self, *_: object) -> None:
            return

    with HTTPServer((HOST, 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        prober = _ServerProber(f"{HOST}:{server.server_port}")
        with pytest.raises(Unavailable, match=complaint):
            prober.probe(5.0)
        prober.close()
        server.shutdown()


def test_what_cannot_start_is_tried_again_and_says_why(tmp_path: Path) -> None:
    supervisor = Supervisor(role(tmp_path), WATCHING, HOST)
    supervisor.start()
    try:
        eventually(lambda: supervisor.report().restarts >= 2, "it was tried again", 30.0)
        report = supervisor.report()
        assert report.state is ProcessState.STARTING
        assert "exit status 2" in report.trouble
        assert "item.safetensors" in report.trouble
    finally:
        supervisor.stop(1.0)


def test_a_shard_that_comes_up_with_another_plan_is_started_again_with_its_own(
    tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not waited for until its time to start is over."""
    prepare, prepared = ShardRole.prepare, []

    def older_first(role: ShardRole, folder: Path) -> None:
        prepare(role, folder)
        prepared.append(folder)
        if len(prepared) < 3:  # one for the supervisor, one for its first process
            older = msgspec.structs.replace(PLAN, model="series")
            (folder / "plan.json").write_bytes(msgspec.json.encode(older))

    monkeypatch.setattr(ShardRole, "prepare", older_first)
    supervisor = Supervisor(role(tables), WATCHING, HOST)
    supervisor.start()
    try:
        report = up(supervisor, 1)
        assert "answered wrongly 2 times in a row" in report.trouble
        assert "this shard has plan 'series-" in report.trouble
    finally:
        supervisor.stop(5.0)


def test_what_a_server_was_told_is_not_written_over(tmp_path: Path) -> None:
    first, later = (Placement(generation, PLAN, (("127.0.0.1:1",),)) for generation in (1, 2))
    made = ServerRole("models", "", ShardSecurity(), (0, 0), first)
    made.prepare(tmp_path)
    write_placement(tmp_path / PLACEMENT, later)
    made.prepare(tmp_path)
    assert read_placement(tmp_path / PLACEMENT) == later


def test_a_process_ends_with_its_supervisor(tables: Path) -> None:
    """Its parent is killed, which can tidy up nothing."""
    code = (
        "import subprocess, sys, os, time\n"
        "command = [sys.executable, '-m', 'rankd.deploy.leashed', str(os.getpid()), 'shard', 'serve', *sys.argv[1:]]\n"
        "child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)\n"
        "print(child.pid, child.stdout.readline(), flush=True)\n"
        "time.sleep(60)\n"
    )
    made = role(tables)
    made.prepare(tables)
    command = [sys.executable, "-c", code, str(tables / "plan.json"), str(tables), "--shard", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline().split()[0])
        assert Path(f"/proc/{child}").exists()
        parent.kill()
        eventually(lambda: not Path(f"/proc/{child}").exists(), "the child has ended")


def test_ports_are_those_that_are_free_and_the_one_before_if_it_is() -> None:
    with socket.create_server((HOST, 0)) as taken:
        port: int = taken.getsockname()[1]
        assert _free_port(HOST, port, (0, 0), 1) != port
        if port + 2 < 1 << 16:
            assert _free_port(HOST, 0, (port, port + 40), 2) > port
        with pytest.raises(Unavailable, match=f"none of the ports {port} to {port}"):
            _free_port(HOST, 0, (port, port), 1)
    assert _free_port(HOST, port, (0, 0), 1) == port


def test_the_generation_of_a_server_is_that_of_its_slowest_model() -> None:
    metrics = "# TYPE rankd_table_generation gauge\n"
    assert _generation(metrics) == 0
    lines = ('rankd_table_generation{model="a",version="1"} 3.0', 'rankd_table_generation{model="b",version="1"} 2.0')
    assert _generation(metrics + "\n".join(lines) + "\n") == 2
