"""A Ray of this machine alone: `up --ray local` starts it, and the `down` of the last deployment on it ends it.

Which process it is stands in Ray itself, beside the deployments, whichever of them was the first.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import msgspec

from rankd.errors import MissingExtra, Unavailable

HOST = "127.0.0.1"
HERE = (HOST, "localhost", "[::1]")
PORT = 6379
START_S = 60.0
STOP_S = 30.0
NICENESS = "RAY_worker_niceness"
"""What Ray lowers the priority of its workers by, 15 unless it is told, and with them that of the shards and servers
which they start: anything else on the machine would come first."""
_KEY = b"rankd-local-ray"


class LocalRay(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A Ray that was started here: its process on `host`, the tick at which that began, and its log."""

    host: str
    pid: int
    began: int
    log: str
    address: str = f"{HOST}:{PORT}"


def show_token(address: str) -> None:
    """Let Ray show our token to a Ray of this machine, "host:port", as it does by itself for "auto": only if there is a
    token, and nothing was said about that."""
    if address.rpartition(":")[0] in HERE and "RAY_AUTH_MODE" not in os.environ and _has_token():
        os.environ["RAY_AUTH_MODE"] = "token"


def start_local() -> LocalRay:
    """Start a Ray that listens on this machine alone, which `stop_local` ends.

    Raises:
        MissingExtra: Ray is not installed. Unavailable: it does not start.
    """
    if find_spec("ray") is None:
        raise MissingExtra("rankd deploy", "cluster")
    program = str(Path(sys.executable).with_name("ray"))
    if "RAY_AUTH_MODE" not in os.environ:
        _make_token(program)
        os.environ["RAY_AUTH_MODE"] = "token"
    command = [program, "start", "--head", "--block", f"--node-ip-address={HOST}", f"--port={PORT}"]
    command += ["--include-dashboard=false", "--disable-usage-stats"]
    environment = {NICENESS: "0", **os.environ}
    with tempfile.NamedTemporaryFile("wb", prefix="rankd-ray-", suffix=".log", delete=False) as output:
        process = subprocess.Popen(  # noqa: S603 - our own command
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    started = LocalRay(socket.gethostname(), process.pid, _began(process.pid), output.name)
    try:
        _wait_started(process, Path(output.name))
    except Unavailable:  # its log is named
        _end(started)
        raise
    except BaseException:
        stop_local(started)
        raise
    return started


def stop_local(ray: LocalRay) -> None:
    """End that Ray, if it still runs, and all that it runs; this process is not connected to it any more.

    Raises:
        Unavailable: it runs on another host, or as somebody else.
    """
    if ray.host != socket.gethostname():
        raise Unavailable(f"the Ray of `--ray local` runs on {ray.host}; end it there with `ray stop`")
    try:
        _end(ray)
    except PermissionError as error:
        raise Unavailable(f"Ray's process {ray.pid} is somebody else's; let them end it with `ray stop`") from error
    with suppress(OSError):
        Path(ray.log).unlink()


def keep(ray: LocalRay) -> None:
    """Write down, in the Ray that this process is connected to, that it is this one."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(_KEY, msgspec.json.encode(ray), overwrite=True)


def kept() -> LocalRay | None:
    """The Ray that this process is connected to, if `start_local` started it."""
    from ray.experimental import internal_kv

    found = internal_kv._internal_kv_get(_KEY)
    return None if found is None else msgspec.json.decode(found, type=LocalRay)


def _has_token() -> bool:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    return "RAY_AUTH_TOKEN" in os.environ or Path(path).is_file()


def _make_token(program: str) -> None:
    """A token for Ray, if there is none yet, that nobody else can read: with it one runs code as us."""
    command = [program, "get-auth-token", "--generate"]
    subprocess.run(command, check=True, capture_output=True, umask=0o077)  # noqa: S603 - our own command
    with suppress(FileNotFoundError):  # it comes from a variable
        (Path.home() / ".ray" / "auth_token").chmod(0o600)


def _wait_started(process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_S
    while "Ray runtime started" not in (text := log.read_text(errors="replace")):
        if process.poll() is not None or time.monotonic() > until:
            raise Unavailable(f"Ray did not start; {log} ends so:\n{text[-2000:]}")
        time.sleep(0.1)


def _end(ray: LocalRay) -> None:
    with suppress(ProcessLookupError):
        if _began(ray.pid) != ray.began:
            return
        os.kill(ray.pid, signal.SIGINT)
        until = time.monotonic() + STOP_S
        while time.monotonic() < until:
            with suppress(ChildProcessError):  # it is not ours, and somebody else's to wait for
                os.waitpid(ray.pid, os.WNOHANG)
            os.kill(ray.pid, 0)
            if _began(ray.pid) != ray.began:
                return
            time.sleep(0.1)
        os.kill(ray.pid, signal.SIGKILL)


def _began(pid: int) -> int:
    """The tick since the machine's start at which a process began, which no later one of this number has; 0 if it has
    ended, or where the kernel does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])  # 22 of the line in proc(5); the first is its 3
