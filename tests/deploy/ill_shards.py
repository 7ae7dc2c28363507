"""Shards of a deployment that are slow, or were started with another plan: faults in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rankd.deploy.process_report import ProcessReport

RUNS_S, STOPS_S = 0.015, 0.135
PATIENCE_S = 30.0


@contextmanager
def ten_times_slower(pid: int) -> Iterator[None]:
    """A process runs for a tenth of the time."""
    done = threading.Event()

    def slow_down() -> None:
        while not done.wait(RUNS_S):
            os.kill(pid, signal.SIGSTOP)
            done.wait(STOPS_S)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=slow_down)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def in_its_place(shard: ProcessReport, plan: Path, until: str) -> Iterator[list[str]]:
    """Kill a shard of this host and start one of another plan at its address, before its supervisor can start it again:
    that is held up until the other one has said `until`, or no more. Yields what it said."""
    command = _words(shard.pid, "cmdline")
    serve = command[command.index("shard") :]
    serve[serve.index("serve") + 1] = str(plan)
    environment = dict(word.partition("=")[::2] for word in _words(shard.pid, "environ"))
    supervisor = int(Path(f"/proc/{shard.pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(supervisor, signal.SIGSTOP)
    try:
        os.kill(shard.pid, signal.SIGKILL)
        process = subprocess.Popen(
            [command[0], "-m", "rankd", *serve],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        ending = threading.Timer(PATIENCE_S, process.kill)
        ending.start()
        said = list[str]()
        while not (said and until in said[-1]) and (line := process.stdout.readline()):
            said.append(line)
        ending.cancel()
        assert any(shard.address in line for line in said), f"it ended with {process.wait()}"
    finally:
        os.kill(supervisor, signal.SIGCONT)
    try:
        yield said
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _words(pid: int, file: str) -> list[str]:
    return Path(f"/proc/{pid}/{file}").read_text().rstrip("\0").split("\0")
