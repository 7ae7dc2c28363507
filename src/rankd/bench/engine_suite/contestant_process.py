"""A contestant's process as the suite `engine` holds it: started, asked one thing after the other, and always ended.

In: commands of `contestant_messages.py`. Out: its replies, or an EngineFailure that says why there is none.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self, TypeVar

import msgspec

from rankd.bench.engine_suite.contestant_messages import (
    LENGTH_BYTES,
    Command,
    Contestant,
    Inputs,
    Load,
    Loaded,
    Refused,
    Reply,
    Score,
    Scored,
    Time,
    Timed,
    unpack,
    write_frame,
)
from rankd.errors import EngineFailure
from rankd.types import Float32Array

Good = TypeVar("Good", Loaded, Scored, Timed)

TIMEOUT_S = 900.0
"""For one reply. The longest wait is for torch.compile: 70 s for workload `base` on two cores."""

STDERR_TAIL = 1500
FAST_PATH = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"
"""MKL asks this function whether to take its best code; on other makers' processors it says no."""


class ContestantProcess:
    """A context manager: inside of it the process runs, after it the process and its children are gone."""

    def __init__(self, contestant: Contestant, threads: int, scratch: Path, timeout_s: float = TIMEOUT_S) -> None:
        self.name = contestant.process
        self._contestant, self._threads, self._scratch, self._timeout_s = contestant, threads, scratch, timeout_s
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  `close` closes it
        self._decoder = msgspec.msgpack.Decoder(Reply)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process's id; it leads a group of its own."""
        if self._process is None:
            raise EngineFailure(f"{self.name} was not started")
        return self._process.pid

    def start(self) -> None:
        """Start the process.

        Raises:
            EngineFailure: it needs a library that cannot be built here.
        """
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self._threads),
            "MKL_NUM_THREADS": str(self._threads),
            "TORCHINDUCTOR_CACHE_DIR": str(self._scratch / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TORCHINDUCTOR_FREEZING": "1",
        }
        if self._contestant.fast:
            environment["LD_PRELOAD"] = str(fast_path_library(self._scratch))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rankd.bench.engine_suite.contestants"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            start_new_session=True,
        )

    def close(self) -> None:
        """End the process and whatever it started. Does nothing the second time."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        self._stderr.close()

    def load(self, artifact: Path, requests: Sequence[Inputs]) -> float:
        """Make it ready; the seconds that it took.

        Raises:
            EngineFailure: it refused, died, or gave no answer. The same holds for what follows.
        """
        one = self._contestant
        command = Load(
            one.family, one.precision, one.target, self._threads, str(artifact), str(self._scratch), list(requests)
        )
        return self._ask(command, Loaded).load_s

    def scores(self, contestant: Contestant) -> list[Float32Array]:
        """Logits (B, C, K) float32 of every request."""
        return [unpack(packed) for packed in self._ask(Score(contestant.work), Scored).logits]

    def time(self, contestant: Contestant, calls: int) -> list[float]:
        """Milliseconds of so many calls."""
        return self._ask(Time(contestant.work, calls), Timed).calls_ms

    def _ask(self, command: Command, kind: type[Good]) -> Good:
        process = self._process
        if process is None or process.stdin is None:
            raise EngineFailure(f"{self.name} was not started")
        try:
            write_frame(process.stdin, command)
        except BrokenPipeError:
            raise self._death(command) from None
        reply = self._read(command)
        if isinstance(reply, Refused):
            raise EngineFailure(reply.reason)
        if not isinstance(reply, kind):
            raise EngineFailure(f"{self.name} answered {type(reply).__name__} to {type(command).__name__}")
        return reply

    def _read(self, command: Command) -> Reply:
        end = time.monotonic() + self._timeout_s
        length = int.from_bytes(self._bytes(LENGTH_BYTES, end, command), "little")
        reply: Reply = self._decoder.decode(self._bytes(length, end, command))
        return reply

    def _bytes(self, size: int, end: float, command: Command) -> bytes:
        process = self._process
        if process is None or process.stdout is None:
            raise EngineFailure(f"{self.name} was not started")
        pipe, parts, missing = process.stdout.fileno(), [], size
        while missing:
            if not select.select([pipe], [], [], max(end - time.monotonic(), 0.0))[0]:
                raise EngineFailure(f"{self.name} gave no answer to {type(command).__name__} in {self._timeout_s:g} s")
            part = os.read(pipe, missing)
            if not part:
                raise self._death(command)
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def _death(self, command: Command) -> EngineFailure:
        """What to say of a process that closed its pipes."""
        process = self._process
        code: object = "?"
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=10.0)
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip()[-STDERR_TAIL:]
        return EngineFailure(
            f"{self.name} ended with status {code} on {type(command).__name__}: {said or 'no message'}"
        )


def fast_path_library(scratch: Path) -> Path:
    """A library to preload into a process, with which MKL takes its best code on any maker's processor.

    Raises:
        EngineFailure: no C compiler, or it failed.
    """
    library = scratch / "fast_path.so"
    if library.exists():
        return library
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise EngineFailure("no C compiler; MKL's fast path is chosen by a small library that has to be compiled")
    source = scratch / "fast_path.c"
    source.write_text(FAST_PATH)
    done = subprocess.run(  # noqa: S603
        [compiler, "-shared", "-fPIC", "-o", str(library), str(source)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise EngineFailure(f"{compiler} failed: {done.stderr[-STDERR_TAIL:]}")
    return library
