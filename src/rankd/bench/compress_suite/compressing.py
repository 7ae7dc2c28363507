"""`rankd bench compress`: a compressed ranker beside the one it was made of, as a plain user would serve that.

In: a run of `rankd train` and one that `rankd compress` made of it. Out: a Report. Stages (`stages.py`) have one cause
more each; all of them answer the same requests of the test days over real sockets.

    alone         one request at a time, stages in turn, latencies as the client sees them; scores are checked first
    under load    the highest rate whose p99 stays under `bound_ms`, stages one after the other
    causes        factors between a stage and the one before it; they multiply to the whole
    elastic       the full model under more than it can do, alone and with the compressed one as its variant
    accuracy      what the gate found on days that nobody trained or chose on, as the records of the run say
    the gate      refuses three compressions that must not come out (`gate_refusals.py`)
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rankd.bench.arrivals import POISSON
from rankd.bench.compress_suite.causes import Figures, gates_of, ratios_of, rows_of
from rankd.bench.compress_suite.elastic_load import elastic_rows
from rankd.bench.compress_suite.gate_refusals import gate_refusals
from rankd.bench.compress_suite.stages import MASKED, MODEL, PRUNED, Compressed, Stage, build_stages
from rankd.bench.load import Connection
from rankd.bench.parity import against_torch, check_same, features_of, scores_in_process
from rankd.bench.report import Neighbours, Report, Row, commit, machine
from rankd.bench.schedule_suite.live_load import LoadedServer, Promise
from rankd.bench.server_process import ServerProcess
from rankd.compress.compress_run import read_compression, read_int8
from rankd.compress.compression_recipe import ReferenceRequest
from rankd.compress.layer_prices import yardstick
from rankd.compress.smaller_model import WEIGHTS, Original, read_subject
from rankd.engine.backend import EngineConfig, Precision
from rankd.errors import ConfigError
from rankd.ranker import Ranker
from rankd.states.state_config import StateConfig
from rankd.train.evaluation import make_test_events
from rankd.train.run import open_run, read_run, weights_sha256
from rankd.train.trainer import check_unseen
from rankd.types import Float32Array, RankRequest

SAME = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.1}
"""Largest difference of a logit between a stage and the same version in process, or for the first ones torch's graph of
the same weights."""
CHECKED = 8
MOST_STAGES = 8
LISTED = 400
"""Requests of the load; single ones are the first of them."""
Advance = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class CompressOptions:
    """Rounds of single requests, and `requests` of each; `candidates` of a request; `seconds` of each rate that is
    tried, and the p99 to keep there."""

    runs: int = 3
    requests: int = 48
    candidates: int = 128
    seconds: float = 5.0
    bound_ms: float = 100.0


class _Suite:
    """The measurements of one run, as they grow."""

    def __init__(self, stages: Sequence[Stage], requests: Sequence[RankRequest], options: CompressOptions) -> None:
        self.stages, self._requests, self._options = stages, requests, options
        self.parity: dict[str, float] = {}
        self.calls_ms: dict[str, list[float]] = {stage.name: [] for stage in stages}
        self.rates: dict[str, float] = {}
        self.tried: list[Row] = []

    def check(self, expected: Mapping[Path, Sequence[Float32Array]], servers: Mapping[str, ServerProcess]) -> None:
        """Scores of all stages; a stage that keeps states has those of all users afterwards.

        Raises:
            EngineFailure: scores that differ from those in process.
        """
        precisions = {stage.version: stage.precision for stage in self.stages}
        for stage in self.stages:
            contestant, server = stage.contestant(single=True), servers[stage.name]
            some = self._requests if stage.warm else self._requests[:CHECKED]
            given = [contestant.decode(server.exchange(contestant.encode(request)), request) for request in some]
            bound = max(SAME[stage.precision], SAME[precisions[stage.truth]])
            name = f"stage '{stage.name}'"
            self.parity[stage.name] = check_same(name, expected[stage.truth], given[:CHECKED], bound)

    def alone(self, servers: Mapping[str, ServerProcess], number: int) -> None:
        """A round of single requests: every stage has them all, and who comes first differs from round to round."""
        turn = number % len(self.stages)
        for stage in (*self.stages[turn:], *self.stages[:turn]):
            contestant, server = stage.contestant(single=True), servers[stage.name]
            encoded = [contestant.encode(one) for one in self._requests[: self._options.requests]]
            with closing(Connection(server.host, server.port)) as connection:
                connection.exchange(encoded[-1])
                for request in encoded:
                    started = time.perf_counter()
                    answer = connection.exchange(request)
                    self.calls_ms[stage.name].append((time.perf_counter() - started) * 1e3)
                    contestant.decode(answer, self._requests[0])

    def under_load(self, stage: Stage, running: ServerProcess) -> None:
        """The highest rate of a stage; with its `running` server, unless that is set for single requests."""
        contestant = stage.contestant(single=False)
        with contestant.launch(0) if stage.set_for_load else nullcontext(running) as server:
            loaded = LoadedServer(contestant, server, self._requests, POISSON, seed=1)
            capacity = loaded.warm(LISTED if stage.warm else CHECKED * 4)
            promise = Promise(self._options.bound_ms, self._options.seconds)
            self.rates[stage.name] = loaded.highest(capacity, promise, self.tried)


def run_compress(run: Path, compressed: Path, data: Path | None, options: CompressOptions, advance: Advance) -> Report:
    """Run the suite.

    Raises:
        ConfigError: the second is no compression of the first. DataError: the log is not theirs.
        BuildError: a model that cannot be built here. EngineFailure: scores differ, or the gate let pass what it must
            not. Unavailable: a server does not start.
    """
    surroundings, told = machine(), itertools.count()
    steps = 6 + 2 * MOST_STAGES + options.runs

    def tell(what: str) -> None:
        advance(min(next(told), steps - 1), steps, what)

    tell("the runs")
    original = Original(run, *open_run(run, data))
    small = _compressed(original, compressed)
    neighbours = Neighbours()
    with TemporaryDirectory(prefix="rankd-bench-") as scratch:
        folder = Path(scratch)
        tell("builds and parity")
        stages = build_stages(folder, original, small)
        requests, expected, parity, tokens = _subject(original, stages, options)
        suite = _Suite(stages, requests, options)
        with ExitStack() as stack:
            servers: dict[str, ServerProcess] = {}
            for stage in stages:
                tell(f"{stage.name}, start")
                servers[stage.name] = stack.enter_context(stage.contestant(single=True).launch(0))
            suite.check(expected, servers)
            for number in range(options.runs):
                tell(f"single requests, round {number + 1}")
                suite.alone(servers, number)
            for stage in stages:
                tell(f"{stage.name}, under load")
                suite.under_load(stage, servers[stage.name])
        figures = Figures(suite.calls_ms, suite.rates, suite.tried, gates_of(small.made))
        tell("elastic")
        promise = Promise(options.bound_ms, options.seconds)
        versions = {stage.name: stage.version for stage in stages}
        elastic = elastic_rows(folder / "elastic", versions[MASKED], versions[figures.cold], requests, promise)
        surroundings["others_cpu_share"] = neighbours.share()
        refused = gate_refusals(original, data, folder, tell)
    about = _about(original, small, stages, options) | {"tokens_a_block": tokens}
    results, ratios = rows_of(figures) + elastic, ratios_of(figures)
    ratios["elastic_gain"] = elastic[1]["good_rate"] / max(elastic[0]["good_rate"], 1e-9)
    results += [{"contestant": name, "table": "what the gate refuses", "why": why} for name, why in refused.items()]
    advance(steps, steps, "done")
    return Report("compress", about, surroundings, commit(), parity | suite.parity, results, ratios)


def _compressed(original: Original, folder: Path) -> Compressed:
    """A compression of the original. Its weights are those of the record, which says what was compressed."""
    made, run = read_compression(folder), original.folder
    if made is None:
        raise ConfigError(f"{folder} is no compression; make one with `rankd compress {run} --recipe ... --out ...`")
    if made.original_sha256 != weights_sha256(run):
        raise ConfigError(f"{folder} was made of another run than {run} (checksums of the weights differ)")
    check_unseen(folder / WEIGHTS, original.dataset)
    subject = read_subject(original, read_run(folder).recipe.model, folder / WEIGHTS)
    return Compressed(subject, made, read_int8(folder, made))


def _subject(
    original: Original, stages: Sequence[Stage], options: CompressOptions
) -> tuple[list[RankRequest], dict[Path, list[Float32Array]], dict[str, float], float]:
    """Requests of the test days, the scores in process of every version, how far these are from torch, and the mean
    tokens of a block."""
    expected: dict[Path, list[Float32Array]] = {}
    requests: list[RankRequest] = []
    parity, tokens = {}, 0.0
    for stage in stages:
        if stage.version != stage.truth or stage.version in expected:
            continue
        engine = EngineConfig("openvino", Precision(stage.precision))
        with Ranker.load(stage.version, engine=engine, states=StateConfig(budget_mib=0)) as ranker:
            if not requests:
                requests = _requests(original, ranker.catalogue.ids.items, options)
                some = [features_of(ranker, one).history["history_length"] for one in requests]
                tokens = float(np.mean(some))
            expected[stage.version] = scores_in_process(ranker, requests[:CHECKED])
            if stage.name in (MASKED, PRUNED):
                key = f"{stage.name}, in process"
                parity[key] = against_torch(ranker, requests[:CHECKED], expected[stage.version])
    return requests, expected, parity, tokens


def _requests(original: Original, items: Sequence[str], options: CompressOptions) -> list[RankRequest]:
    """Users as they come in the test days, candidates drawn evenly."""
    dataset, random = original.dataset, np.random.default_rng(1)
    events, _ = make_test_events(dataset, dataset.validate_until, dataset.schema.log_end + 1, 1, 0)
    if options.candidates > min(len(items), dataset.schema.max_candidates):
        raise ConfigError(
            f"{options.candidates} candidates; this model takes {dataset.schema.max_candidates} a call and has "
            f"{len(items)} items"
        )
    chosen = [events[number].sample.user for number in random.integers(len(events), size=LISTED)]
    return [
        RankRequest(
            str(dataset.log.user_ids[user]),
            tuple(items[one] for one in random.choice(len(items), options.candidates, replace=False)),
            model=MODEL,
        )
        for user in chosen
    ]


def _about(original: Original, small: Compressed, stages: Sequence[Stage], options: CompressOptions) -> dict[str, Any]:
    schema = original.dataset.schema
    stick = yardstick(ReferenceRequest(candidates=options.candidates), schema)
    flops = {"original": original.subject(), "compressed": small.subject}
    return {
        "name": original.run.description.name,
        "use": "a trained ranker and what was made of it",
        "served": {
            "candidates": options.candidates,
            "history a block": schema.history_length,
            "stages": len(stages),
            "precision": next(stage.precision for stage in stages if stage.name == PRUNED),
        },
        "flops": {name: stick.flops(subject.anatomy()) for name, subject in flops.items()},
        "recipe": small.made.recipe,
        "bound_ms": options.bound_ms,
        "runs": options.runs,
    }
