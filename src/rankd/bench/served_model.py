"""A real server in a process of its own: `python -m rankd serve`, from a free port to SIGTERM."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryFile
from types import MappingProxyType
from typing import Any, Self

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from rankd.bench.load import HEAD_END, Answer, Connection
from rankd.errors import Unavailable

READY_SECONDS = 180.0
STOP_SECONDS = 30.0
POLL_SECONDS = 0.02


class ServedModel:
    """A model repository being served; use it as a context manager. `host` and `port` are known once it is started.

    `command` is what `python -m` runs, with the repository behind it; `variables` are its own, of which it reads
    RANKD_*.
    """

    def __init__(
        self,
        root: Path,
        command: Sequence[str] = ("rankd", "serve"),
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._root, self._command, self._variables = root, command, variables
        self._log = TemporaryFile()  # noqa: SIM115 - the server writes to it as long as it lives
        self._process: subprocess.Popen[bytes] | None = None
        self.host, self.port = "", 0

    def start(self) -> float:
        """Start, and wait until it is ready; returns the seconds that took.

        Raises:
            Unavailable: it ended, or was not ready in time; the message has the end of its log.
        """
        started = time.perf_counter()
        self._process = self._launch()
        try:
            while not self._is_ready():
                if self._process.poll() is not None or time.perf_counter() - started > READY_SECONDS:
                    raise Unavailable(
                        f"`{' '.join(self._command)}` did not become ready; its log ends so:\n{self._text()[-2000:]}"
                    )
                time.sleep(POLL_SECONDS)
        except BaseException:
            self.close()
            raise
        return time.perf_counter() - started

    def close(self) -> None:
        """SIGTERM, and SIGKILL if it has not drained in time; it is not started again."""
        self._log.close()
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def exchange(self, request: bytes) -> Answer:
        """One request over a connection of its own."""
        with closing(Connection(self.host, self.port)) as connection:
            return connection.exchange(request)

    def engine_statistics(self, model: str) -> tuple[int, float]:
        """How many requests a model has answered, and the milliseconds that its engine has spent on them in all."""
        answer = self.exchange(_get(f"/v2/models/{model}/stats"))
        (about,) = msgspec.json.decode(answer.body)["model_stats"]
        spent: dict[str, Any] = about["inference_stats"]["compute_infer"]
        return spent["count"], spent["ns"] / 1e6

    def metrics_text(self) -> str:
        """What /metrics says."""
        return self.exchange(_get("/metrics")).body.decode()

    def state_origins(self, model: str) -> dict[str, float]:
        """Requests by where their user's state came from, as /metrics counts them."""
        return {
            sample.labels["origin"]: sample.value
            for family in text_string_to_metric_families(self.metrics_text())
            for sample in family.samples
            if sample.name == "rankd_states_total" and sample.labels["model"] == model
        }

    def counter(self, name: str) -> float:
        """A figure of /metrics, summed over its labels."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.metrics_text())
            for sample in family.samples
            if sample.name == name
        )

    @property
    def pid(self) -> int:
        """The process.

        Raises:
            Unavailable: it does not run.
        """
        if self._process is None:
            raise Unavailable(f"`{' '.join(self._command)}` was not started")
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _launch(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", *self._command, str(self._root)]
        # The contestant in process reads no variables either.
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RANKD_")}
        return subprocess.Popen(  # noqa: S603 - our own command
            command, stdout=subprocess.DEVNULL, stderr=self._log, env={**clean, "RANKD_PORT": "0", **self._variables}
        )

    def _is_ready(self) -> bool:
        found = re.search(r"listening on http://([\d.]+):(\d+)", self._text())
        if found is None:
            return False
        self.host, self.port = found[1], int(found[2])
        try:
            return self.exchange(_get("/health/ready")).status == 200
        except OSError:
            return False

    def _text(self) -> str:
        descriptor = self._log.fileno()  # pread: the place where the server goes on writing stays where it is
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")


def _get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: rankd".encode() + HEAD_END
