"""One process: started, asked how it is, and started again when it has ended or does not answer.

    starting --answers--> up --misses--> silent --answers--> up
        |                  |               |
        +--ended, or too late, or too many misses: killed--> starting, at the same address if that is free

What answers wrongly (garbage, another plan) while it starts is not waited for: that is a miss as well. A thread of its
own does all of it; other threads read `report()`.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

from msgspec.structs import replace

from rankd.deploy.deployment import Watching
from rankd.deploy.process_report import ProcessReport, ProcessState
from rankd.deploy.roles import Prober, Role
from rankd.errors import RankdError, ShardFailure, Trouble, Unavailable
from rankd.shards.replica import Backoff

LOG_TAIL = 2000
"""Characters of the process's log that a trouble quotes."""

WRONG = (Trouble.BROKEN, Trouble.DENIED)
"""Somebody answers there, and not the shard that is to."""

log = logging.getLogger("rankd")


class Supervisor:
    """Keeps a process of this role running at `host`. `node` is named in reports."""

    def __init__(self, role: Role, watching: Watching, host: str, node: str = "") -> None:
        self._role, self._watching, self._host = role, watching, host
        self.folder = Path(tempfile.mkdtemp(prefix="rankd-process-"))
        self._report = ProcessReport(ProcessState.STARTING, node=node, host=host)
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._missed_at: float | None = None
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # guards starting a process against `stop`
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        """Start the process; `report` says when it answers."""
        self._role.prepare(self.folder)
        self._thread.start()

    def report(self) -> ProcessReport:
        """How it is now."""
        return self._report

    def stop(self, drain_seconds: float) -> None:
        """Ask the process to go, and end it if it has not gone in time; its folder goes too."""
        self._stopping.set()
        with self._lock:
            process = self._process
        if process is not None:
            with suppress(ProcessLookupError):
                process.terminate()
            try:
                process.wait(drain_seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._thread.ident is not None:
            self._thread.join()
        self._report = replace(self._report, state=ProcessState.ENDED, pid=0)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self) -> None:
        backoff = Backoff(0.05, 5.0)
        while not self._stopping.is_set():
            try:
                trouble = self._run_once(backoff)
            except (OSError, RankdError) as error:
                trouble = f"it could not be started: {error}"
            except Exception as error:  # the edge of the thread: without it nobody starts the process any more
                log.exception("process %d could not be supervised", self._report.pid)
                trouble = f"it could not be supervised: {type(error).__name__}: {error}"
            if not self._stopping.is_set():
                self._lost(trouble)
                self._stopping.wait(backoff.next_s())

    def _run_once(self, backoff: Backoff) -> str:
        """Start the process and watch it; why it does not run any more."""
        process = self._launch()
        if process is None:
            return ""
        try:
            with closing(self._role.prober(self._report.address)) as prober:
                return self._watch(process, prober, backoff)
        finally:
            if not self._stopping.is_set():
                process.kill()
            # Also while it drains, until `stop` kills it: the kernel ends it with the thread that started it
            process.wait()

    def _launch(self) -> subprocess.Popen[bytes] | None:
        """The process, started; None if it is not to run any more."""
        self._role.prepare(self.folder)
        self._port = _free_port(self._host, self._port, self._role.ports, self._role.num_ports)
        command = [sys.executable, "-m", "rankd.deploy.leashed", str(os.getpid())]
        command += self._role.command(self.folder, self._host, self._port)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RANKD_")}
        with self._lock:
            if self._stopping.is_set():
                return None
            with (self.folder / "log").open("wb") as output:
                self._process = subprocess.Popen(  # noqa: S603 - our own command
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**kept, **self._role.variables(self.folder)},
                    start_new_session=True,
                )
        address = f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"
        self._report = replace(
            self._report, state=ProcessState.STARTING, address=address, pid=self._process.pid, generation=0
        )
        return self._process

    def _watch(self, process: subprocess.Popen[bytes], prober: Prober, backoff: Backoff) -> str:
        """Until the process has ended or is to be killed; why."""
        watching, begun, misses = self._watching, time.perf_counter(), 0
        while True:
            asked_at = time.perf_counter()
            try:
                generation = prober.probe(watching.answer_seconds)
            except RankdError as error:
                wrong = isinstance(error, ShardFailure) and error.trouble in WRONG
                if self._report.state is not ProcessState.STARTING:
                    misses += 1
                    self._missed(asked_at)
                elif time.perf_counter() - begun > watching.start_seconds:
                    return f"it did not answer within {watching.start_seconds:g} s: {error}; {self._log_tail()}"
                else:
                    misses = misses + 1 if wrong else 0
                if misses >= watching.misses:
                    return f"it {'answered wrongly' if wrong else 'did not answer'} {misses} times in a row: {error}"
            else:
                misses = 0
                backoff.reset()
                self._answered(generation)
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(watching.every_seconds)
                return f"it ended with {_exit(code)}; {self._log_tail()}"

    def _answered(self, generation: int) -> None:
        recovery_s = self._report.recovery_s
        if self._missed_at is not None:
            recovery_s, self._missed_at = time.perf_counter() - self._missed_at, None
        self._report = replace(self._report, state=ProcessState.UP, generation=generation, recovery_s=recovery_s)

    def _missed(self, since: float) -> None:
        self._missed_at = self._missed_at or since
        self._report = replace(self._report, state=ProcessState.SILENT)

    def _lost(self, trouble: str) -> None:
        log.warning("process %d: %s", self._report.pid, trouble)
        self._missed_at = self._missed_at or time.perf_counter()
        self._report = replace(
            self._report,
            state=ProcessState.STARTING,
            pid=0,
            restarts=self._report.restarts + 1,
            trouble=trouble,
        )

    def _log_tail(self) -> str:
        with suppress(OSError):
            text = (self.folder / "log").read_text(errors="replace").strip()
            return f"its log ends so:\n{text[-LOG_TAIL:]}"
        return "it left no log"


def _exit(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _free_port(host: str, before: int, allowed: tuple[int, int], count: int) -> int:
    """A port that is free with the `count` - 1 above it: the one that it had before if it can, so that whoever asks it
    finds it again.

    Raises:
        Unavailable: none of those allowed is free.
    """
    first, last = allowed
    tried = [before] if before else []
    tried += range(first, last + 2 - count) if last else [0] * 20
    for port in tried:
        if found := _bindable(host, port, count):
            return found
    raise Unavailable(f"none of the ports {first} to {last} is free at {host}; allow more")


def _bindable(host: str, port: int, count: int) -> int:
    """That port, or a free one for 0; 0 if it or one above it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = port
    for place in range(count):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, found + place))
            except (OSError, OverflowError):
                return 0
            found = found or int(probe.getsockname()[1])
    return found
