"""Two Ray nodes on one machine that see each other and nothing else: a network namespace each, joined by a wire.

Ray listens where others reach it; in a namespace nobody does. The main thread of the tests moves into the first node's
namespace, and with it every process and thread that it starts. Without the right to do so, tests are skipped.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

CLONE_NEWNET = 0x40000000  # linux/sched.h
HEAD, OTHER = "10.77.0.1", "10.77.0.2"
PORT = 6399
PATIENCE_S = 180.0
NODE = ("--num-cpus", "4", "--object-store-memory", str(100 << 20), "--disable-usage-stats")
MEMORY = {HEAD: 8 << 30, OTHER: 1 << 30}
"""What Ray gives away of each node: a process that reserves more than the second has is on the first."""
QUICK = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3", "RAY_worker_niceness": "0"}
"""A node that has ended is missed after seconds, and its processes are not behind all others for a core."""
FAULTY = str(Path(__file__).with_name("faulty"))
"""What shards of these tests can be made to do wrong."""


class RayNodes:
    """A Ray of two nodes. `address` is for `--ray`; `environment` for processes that talk to it."""

    address = f"{HEAD}:{PORT}"

    def __init__(self, wire: list[str], folder: Path) -> None:
        self._wire, self._folder = wire, folder
        self._namespaces = {_namespace("thread-self"), _namespace(wire[2])}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        token = folder / "token"
        token.write_text("0123456789abcdef" * 4)
        python = os.pathsep.join([FAULTY, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment = {**os.environ, **QUICK, "PYTHONPATH": python}
        self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}

    def start_head(self) -> None:
        """The first node."""
        self._start(HEAD, [], ["--head", "--port", str(PORT), "--include-dashboard=false", "--temp-dir", self._temp])

    def start_other(self) -> None:
        """The second node."""
        self._start(OTHER, self._wire, ["--address", self.address])

    def end(self, host: str) -> None:
        """A node and all that runs on it."""
        process = self._processes.pop(host, None)
        if process is None:
            return
        process.send_signal(signal.SIGINT)
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def processes(self, command: str) -> list[int]:
        """The processes on both nodes that have this in their command lines."""
        found = subprocess.run(["pgrep", "-f", command], capture_output=True, text=True).stdout.split()
        return [int(pid) for pid in found if _namespace(pid) in self._namespaces]

    def close(self) -> None:
        """Both nodes."""
        for host in (OTHER, HEAD):
            self.end(host)

    @property
    def _temp(self) -> str:
        return str(self._folder / "ray")

    def _start(self, host: str, prefix: list[str], options: list[str]) -> None:
        log = self._folder / f"{host}.log"
        ray = str(Path(sys.executable).with_name("ray"))
        with log.open("wb") as output:
            self._processes[host] = subprocess.Popen(
                [
                    *prefix,
                    ray,
                    "start",
                    "--block",
                    "--node-ip-address",
                    host,
                    "--memory",
                    str(MEMORY[host]),
                    *options,
                    *NODE,
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment,
                start_new_session=True,
            )
        until = time.monotonic() + PATIENCE_S
        while "Ray runtime started" not in (text := log.read_text(errors="replace")):
            if time.monotonic() > until or self._processes[host].poll() is not None:
                pytest.fail(f"Ray did not start at {host}:\n{text[-3000:]}")
            time.sleep(0.05)


def _namespace(pid: str) -> int:
    """The network namespace of a process; 0 if it has ended, or is not ours to see."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return 0


@contextmanager
def two_nodes() -> Iterator[RayNodes]:
    """Started, and ended with the block."""
    with ExitStack() as stack:
        stack.enter_context(own_namespace())
        wire = stack.enter_context(_wired())
        # Not pytest's folder: the names of Ray's sockets in it would be too long for the kernel
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rankd-ray-", ignore_cleanup_errors=True))
        nodes = RayNodes(wire, Path(folder))
        stack.callback(nodes.close)
        nodes.start_head()
        nodes.start_other()
        yield nodes


@contextmanager
def own_namespace() -> Iterator[None]:
    """This thread is in a network namespace that has a loopback device and nothing else."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'rankd[cluster]'")
    for program in ("unshare", "nsenter", "ip", "pgrep"):
        if shutil.which(program) is None:
            pytest.skip(f"no `{program}` on this machine: Ray has to run where nobody reaches it")
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(CLONE_NEWNET) != 0:
            pytest.skip(f"no network namespace for Ray: {os.strerror(ctypes.get_errno())}")
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            yield
        finally:
            libc.setns(before, CLONE_NEWNET)
    finally:
        os.close(before)


@contextmanager
def _wired() -> Iterator[list[str]]:
    """A cable from here, which is HEAD, to a namespace at OTHER; yields the command that runs another one there."""
    other = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    inside = ["nsenter", "--target", str(other.pid), "--net"]
    try:
        until = time.monotonic() + PATIENCE_S
        while _namespace(str(other.pid)) == _namespace("thread-self"):
            assert time.monotonic() < until, "unshare has not made a namespace"
            time.sleep(0.01)
        for command in (
            "ip link add rankd0 type veth peer name rankd1",
            f"ip link set rankd1 netns {other.pid}",
            f"ip addr add {HEAD}/24 dev rankd0",
            "ip link set rankd0 up",
        ):
            subprocess.run(command.split(), check=True)
        for command in ("ip link set lo up", f"ip addr add {OTHER}/24 dev rankd1", "ip link set rankd1 up"):
            subprocess.run([*inside, *command.split()], check=True)
        yield inside
    finally:
        other.kill()
        other.wait()
