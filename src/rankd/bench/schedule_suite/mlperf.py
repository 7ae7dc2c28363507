"""MLPerf's own load generator against `rankd serve`: scenarios Server and Offline, as MLPerf runs and judges them.

In: a workload, a scenario. Out: a Report, and LoadGen's logs as it wrote them. LoadGen says when which request is due
and keeps the time; here each is sent over a connection of its own and reported when its answer is there. Whether a run
is VALID is LoadGen's verdict; answers that are no scores are counted beside it, since LoadGen knows no errors.
"""

from __future__ import annotations

import importlib
import importlib.util
import queue
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rankd.bench.load import Connection
from rankd.bench.report import Neighbours, Report, Row, commit, machine
from rankd.bench.schedule_suite.live_contestants import RANKD, STATIC_SHAPES, served
from rankd.bench.schedule_suite.live_load import SHARE, LoadedServer
from rankd.bench.schedule_suite.live_schedule import LiveOptions, build_subject
from rankd.bench.workload import Workload
from rankd.errors import EngineFailure, MissingExtra

SUMMARY = "mlperf_log_summary.txt"
CONNECTIONS = 64
FIGURES = {
    "requests_a_second": r"(?:Completed samples per second|Samples per second)\s*:\s*([\d.e+]+)",
    "scheduled_a_second": r"Scheduled samples per second\s*:\s*([\d.e+]+)",
    "p50_ms": r"50\.00 percentile latency \(ns\)\s*:\s*(\d+)",
    "p99_ms": r"99\.00 percentile latency \(ns\)\s*:\s*(\d+)",
    "p999_ms": r"99\.90 percentile latency \(ns\)\s*:\s*(\d+)",
}
Step = Callable[[int, int, str], None]


class Scenario(Enum):
    """Poisson arrivals under a bound of the p99, or everything at once."""

    SERVER = "server"
    OFFLINE = "offline"


@dataclass(frozen=True, slots=True)
class MlperfOptions:
    """What LoadGen is asked for: `rate` requests a second (None: of Server 70% of the capacity, of Offline all of it),
    `seconds` at least, the bound of the p99, and the folder that its logs go to."""

    scenario: Scenario
    logs: Path
    rate: float | None = None
    seconds: float = 60.0
    bound_ms: float = 100.0


def run_mlperf(workload: Workload, options: MlperfOptions, advance: Step) -> Report:
    """Run a scenario.

    Raises:
        MissingExtra: LoadGen or torch is not installed.
        EngineFailure: scores differ from those in process, or LoadGen left no result.
    """
    if importlib.util.find_spec("mlperf_loadgen") is None:
        raise MissingExtra("rankd bench mlperf", "mlperf")
    surroundings = machine()
    options.logs.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="rankd-bench-") as folder:
        advance(0, 3, "model and parity")
        live = LiveOptions(bound_ms=options.bound_ms)
        subject, parity, about = build_subject(workload, Path(folder), live)
        contestant = served(RANKD, subject.fine, STATIC_SHAPES)
        advance(1, 3, "warm-up")
        with contestant.launch(0) as server:
            loaded = LoadedServer(contestant, server, subject.requests, live.arrivals, workload.seed)
            parity[RANKD] = loaded.check(subject.expected, subject.precision)
            capacity = loaded.warm()
            advance(2, 3, options.scenario.value)
            rate = options.rate or capacity * (SHARE if options.scenario is Scenario.SERVER else 1.0)
            neighbours = Neighbours()
            client = _Client(server.host, server.port, [contestant.encode(request) for request in subject.requests])
            with closing(client):
                _start_test(client, options, rate)
        surroundings["others_cpu_share"] = neighbours.share()
    advance(3, 3, "done")
    row = _read_summary(options.logs / SUMMARY) | {"failed": client.failed, "requests": client.answered + client.failed}
    about |= {"scenario": options.scenario.value, "logs": str(options.logs), "rate": rate}
    return Report(
        "mlperf",
        about,
        surroundings,
        commit(),
        parity,
        [{"contestant": RANKD, "table": f"LoadGen, {options.scenario.value}", **row}],
        {"valid": float(row["verdict"] == "VALID" and not client.failed)},
    )


class _Client:
    """Connections to a server, each with a thread that sends what LoadGen asks for."""

    def __init__(self, host: str, port: int, encoded: Sequence[bytes]) -> None:
        self.encoded, self.answered, self.failed = encoded, 0, 0
        self._loadgen: Any = importlib.import_module("mlperf_loadgen")
        self._asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._send, args=(Connection(host, port),), daemon=True) for _ in range(CONNECTIONS)
        ]
        for thread in self._threads:
            thread.start()

    def issue(self, samples: Sequence[Any]) -> None:
        """LoadGen's samples are due now."""
        for sample in samples:
            self._asked.put(sample)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """End the threads."""
        for _ in self._threads:
            self._asked.put(None)
        for thread in self._threads:
            thread.join()

    def _send(self, connection: Connection) -> None:
        with closing(connection):
            while (sample := self._asked.get()) is not None:
                try:
                    if connection.ended():  # 64 of them: some are used so rarely that the server lets them go
                        connection.reopen()
                    good = connection.exchange(self.encoded[sample.index]).status == 200
                except OSError:
                    good = False
                    connection.reopen()
                self._loadgen.QuerySamplesComplete([self._loadgen.QuerySampleResponse(sample.id, 0, 0)])
                with self._lock:
                    self.answered += good
                    self.failed += not good


def _start_test(client: _Client, options: MlperfOptions, rate: float) -> None:
    """Run LoadGen until it is done."""
    loadgen: Any = importlib.import_module("mlperf_loadgen")
    settings = loadgen.TestSettings()
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = int(options.seconds * 1e3)
    if options.scenario is Scenario.SERVER:
        settings.scenario = loadgen.TestScenario.Server
        settings.server_target_qps = rate
        settings.server_target_latency_ns = int(options.bound_ms * 1e6)
        settings.server_target_latency_percentile = 0.99
    else:
        settings.scenario = loadgen.TestScenario.Offline
        settings.offline_expected_qps = rate
    settings.min_query_count = 1
    output = loadgen.LogOutputSettings()
    output.outdir, output.copy_summary_to_stdout = str(options.logs), False
    log = loadgen.LogSettings()
    log.log_output, log.enable_trace = output, False
    count = len(client.encoded)
    library = loadgen.ConstructQSL(count, count, lambda samples: None, lambda samples: None)
    subject = loadgen.ConstructSUT(client.issue, client.flush)
    try:
        loadgen.StartTestWithLogSettings(subject, library, settings, log)
    finally:
        loadgen.DestroySUT(subject)
        loadgen.DestroyQSL(library)


def _read_summary(path: Path) -> Row:
    """Figures and verdict of a summary.

    Raises:
        EngineFailure: there is none.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise EngineFailure(f"LoadGen left no summary: {error}") from error
    verdict = re.search(r"Result is\s*:\s*(\w+)", text)
    if verdict is None:
        raise EngineFailure(f"{path} has no result: {text[-500:]}")
    row: Row = {"verdict": verdict[1]}
    for name, pattern in FIGURES.items():
        if (found := re.search(pattern, text)) is not None:
            row[name] = float(found[1]) / (1e6 if name.endswith("_ms") else 1.0)
    return row
