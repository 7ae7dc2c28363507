"""The suite `engine`: small but real runs. Who computes what, who is left out and why; nothing of how fast it was."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import rankd.bench.engine_suite.engine as suite
from rankd.artifact import Artifact
from rankd.bench.engine_suite import own_contestant
from rankd.bench.engine_suite.contestant_messages import (
    CONTESTANTS,
    Family,
    Load,
    Packed,
    Work,
    pack,
    pack_features,
    together,
    unpack,
    unpack_features,
)
from rankd.bench.engine_suite.contestant_process import ContestantProcess, fast_path_library
from rankd.bench.engine_suite.dense_model import DenseRanker
from rankd.bench.engine_suite.engine import choose, compete, prepare
from rankd.bench.engine_suite.engine_findings import Trial, best_peer, ratios, report_of, row_of, work_flops
from rankd.bench.flops import Flops
from rankd.bench.peak import gpu_peak_gflops
from rankd.bench.report import Report, print_report
from rankd.bench.synthetic_model import build_model, schema_of
from rankd.bench.workload import Workload, read_workload
from rankd.cli.benchmarks import bench
from rankd.engine.backend import EngineConfig, Precision
from rankd.engine.cuda.cuda_backend import CudaBackend, model_of
from rankd.errors import ConfigError, EngineFailure
from rankd.features.schema import candidate_specs, history_specs
from rankd.models.climber import Climber
from rankd.types import Array, Features
from tests.engine.cuda.interpreted_device import InterpretedDevice

TINY = """
name = "tiny"
use = "tests"
model = { blocks = 2, layers = 1, width = 16, heads = 2, hidden = 8, tasks = 2 }
history = { law = "fixed", value = 32 }
candidates = { law = "fixed", value = 4 }
users = { count = 30, zipf_exponent = 1.0 }
buckets = { history = [16], candidates = [4] }
items = 60
"""
RUN = (
    "eager-fp32",
    "ort-fp32",
    "openvino-fp32",
    "rankd-openvino-fp32-cold",
    "rankd-openvino-fp32-warm",
    "rankd-openvino-fp32-encode",
    "rankd-openvino-fp32-extend",
)
FLOPS = Flops(dense=8e9, useful=6e9, needed=4e9, candidates=1e9)


def nothing(count: int, line: str) -> None:
    """Progress that nobody looks at."""


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    path = tmp_path_factory.mktemp("workload") / "tiny.toml"
    path.write_text(TINY)
    return read_workload(path)


@pytest.fixture(scope="module")
def trial(workload: Workload, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    folder = tmp_path_factory.mktemp("trial")
    built = build_model(workload, folder / "built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "build_model", lambda *_: built)
        return prepare(workload, folder, ("openvino",))


@pytest.fixture
def prepared(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> Trial:
    """A run of the suite takes the model that is there already."""
    monkeypatch.setattr(suite, "build_model", lambda *_: trial.artifact)
    return trial


def gone(pid: int) -> bool:
    """Whether neither the process nor one of its group is there."""
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.real_run
def test_engine_ends_with_the_contract(prepared: Trial, tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    arguments = ["engine", "--workload", str(path), "--runs", "2", "--threads", "1", "--json"]
    done = CliRunner().invoke(bench, [*arguments, *(f"--contestant={name}" for name in RUN)], catch_exceptions=False)
    document = json.loads(done.stdout.splitlines()[-1])
    assert list(document) == ["suite", "workload", "machine", "commit", "parity", "results", "ratios"]
    assert document["suite"] == "engine"
    about = document["workload"]
    assert about["name"] == "tiny"
    assert about["served"]["source"] == "random weights"
    assert about["served"]["tokens_a_block"] == 16
    assert about["ratios_of"] == {"1t": "rankd-openvino-fp32"}
    assert about["best_peer"] == {
        "over_best_peer_cold": min(
            ("ort-fp32", "openvino-fp32"),
            key=lambda name: next(row["p50_ms"] for row in document["results"] if row["contestant"] == name),
        )
    }
    assert document["machine"]["torch"] == torch.__version__
    assert set(document["parity"]) == set(RUN)
    assert max(document["parity"].values()) < 1e-4
    rows = {row["contestant"]: row for row in document["results"]}
    assert set(rows) == set(RUN)
    for row in rows.values():
        assert row["threads"] == 1
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["calls"] >= 2 * suite.FEWEST
        assert row["gflops_reached"] == pytest.approx(row["gflop_needed"] / row["p50_ms"] * 1e3, rel=1e-4)
        assert row["peak_share"] == pytest.approx(row["gflops_reached"] / row["peak_gflops"], rel=1e-4)
    assert all(row["throughput"] > 0 for name, row in rows.items() if not name.endswith(("encode", "extend")))
    cold, warm, encode = (
        rows[f"rankd-openvino-fp32-{work.value}"]["gflop_needed"] for work in (Work.COLD, Work.WARM, Work.ENCODE)
    )
    assert cold == pytest.approx(warm + encode, rel=1e-4)
    found = document["ratios"]
    assert set(found) == {
        "speedup_cold",
        "speedup_warm",
        "over_best_peer_cold",
        "extend_over_encode",
        "peak_share",
        "states_per_gib",
    }
    expected = rows["eager-fp32"]["p50_ms"] / rows["rankd-openvino-fp32-cold"]["p50_ms"]
    assert found["speedup_cold"] == pytest.approx(expected, rel=1e-4)


def test_several_users_in_a_call(trial: Trial) -> None:
    """Eight requests are two calls of three users; who computes other scores for one of them would be left out."""
    chosen = choose(RUN)
    results = compete(trial, chosen, 1, 1, nothing, users=3)
    assert results.reasons == {}
    assert set(results.parity) == set(RUN)
    report = report_of(trial, 1, [results], {}, chosen, {"bf16": {"states_per_gib": 1.0}})
    assert {row["contestant"] for row in report.results} == set(RUN)
    assert report.ratios["speedup_cold_3u"] > 0
    assert (report.workload["ratios_of"], report.workload["users_a_call"]) == ({"1t_3u": "rankd-openvino-fp32"}, [3])
    assert max(results.parity.values()) < 1e-4
    assert (results.suffix, results.setting) == ("_3u", "1t_3u")
    requests, expected = trial.batches(3)
    assert len(requests) == len(expected) == 2
    assert expected[0].shape == (3, 4, 2)
    swapped = Trial(trial.workload, trial.about, trial.artifact, trial.scratch, trial.requests, trial.expected[::-1])
    assert compete(swapped, choose(["ort-fp32"]), 1, 1, nothing, users=3).reasons["ort-fp32"].startswith("its scores")
    row = row_of(chosen[0], results, trial, 2e9)
    assert (row["users"], row["gflop_needed"]) == (3, 6.0)
    assert trial.candidates(5, 3) == 60


def test_users_are_computed_in_one_call_where_an_executor_can(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(Artifact.open(trial.artifact), Precision.FP32, lambda tensor: tensor, tile=16, page=16)
    backend = CudaBackend(model, InterpretedDevice, EngineConfig(gpu_state_mib=1))
    monkeypatch.setattr(own_contestant, "load_backend", lambda artifact, config: backend)
    requests, expected = trial.batches(3)
    load = Load(Family.RANKD, Precision.FP32, "cuda", 1, str(trial.artifact), str(trial.scratch), requests[:1])
    made = own_contestant.rankd_calls(load, [unpack_features(one) for one in requests[:1]])
    alone = backend.executor()
    for name in ("encode", "extend"):
        monkeypatch.setattr(type(alone), name, lambda *_: pytest.fail("users are computed one by one"))
    for work in (Work.COLD, Work.WARM, Work.EXTEND):
        assert np.abs(made[work].logits(0) - expected[0]).max() < 1e-4


def test_requests_of_different_sizes_make_no_batch(trial: Trial) -> None:
    one = unpack_features(trial.requests[0])
    shorter = Features(one.history, {n: a[:, :2] if a.ndim > 2 else a for n, a in one.candidates.items()}, 2)
    with pytest.raises(ConfigError, match="2 users in a call: the requests of this workload are of different sizes"):
        together([trial.requests[1], pack_features(shorter)], 2)


def test_a_target_has_its_own_contestants_and_is_refused_where_it_cannot_be() -> None:
    on_gpu = choose([], "cuda")
    assert {one.target for one in on_gpu} == {"cuda"}
    assert {one.family for one in on_gpu} >= {Family.RANKD, Family.EAGER, Family.FLEX, Family.TENSORRT}
    on_cpu = choose([], "openvino")
    assert {one.target for one in on_cpu} == {"", "openvino"}
    with pytest.raises(ConfigError, match=r"unknown target 'cude'; .* Did you mean 'cuda'"):
        CliRunner().invoke(bench, ["engine", "--target", "cude"], catch_exceptions=False)


def test_a_target_that_is_not_here_is_refused(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "runs_here", lambda target: False)
    monkeypatch.setattr(suite, "why_not", lambda target, precision: "there is no GPU")
    with pytest.raises(ConfigError, match="--target cuda cannot compute workload 'tiny' here: there is no GPU"):
        suite.run_engine(workload, suite.EngineOptions(target="cuda"), lambda *_: None)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_of_a_gpu_is_a_product(precision: str) -> None:
    assert 0 < gpu_peak_gflops(precision, "cpu", 64) < 1e7


@pytest.mark.parametrize("name", ["base", "rankd-openvino-fp32-cool"])
def test_unknown_contestant_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown contestant '{name}'; there is: eager-fp32, "):
        CliRunner().invoke(bench, ["engine", "--contestant", name], catch_exceptions=False)
    with pytest.raises(ConfigError, match="Did you mean 'rankd-openvino-fp32-cold'"):
        choose(["rankd-openvino-fp32-cool"])


def test_contestants_are_chosen_in_order_and_share_processes() -> None:
    assert [one.name for one in choose(["rankd-openvino-bf16-warm", "eager-fp32", "rankd-openvino-bf16-cold"])] == [
        "eager-fp32",
        "rankd-openvino-bf16-cold",
        "rankd-openvino-bf16-warm",
    ]
    assert len(choose([])) == len(CONTESTANTS)
    assert {one.process for one in choose(["rankd-openvino-bf16-warm", "rankd-openvino-bf16-cold"])} == {
        "rankd-openvino-bf16"
    }
    assert CONTESTANTS["eager-bf16-fast"].process == "eager-bf16-fast"


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("raise ImportError('no such package here')", "ImportError: no such package here"),
        ("import os\nos.write(2, b'boom')\nos._exit(3)", "ort-fp32 ended with status 3 on Load: boom"),
    ],
)
def test_a_peer_that_cannot_run_is_left_out(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, reason: str
) -> None:
    (tmp_path / "onnxruntime.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pids = []
    start = ContestantProcess.start

    def noted(process: ContestantProcess) -> None:
        start(process)
        pids.append(process.pid)

    monkeypatch.setattr(ContestantProcess, "start", noted)
    results = compete(trial, choose(["ort-fp32"]), 1, 1, nothing)
    assert results.reasons == {"ort-fp32": reason}
    assert results.calls_ms == {}
    assert results.parity == {}
    assert len(pids) == 1
    assert gone(pids[0])


def test_our_own_engine_may_not_fail(trial: Trial, tmp_path: Path) -> None:
    broken = Trial(trial.workload, trial.about, tmp_path / "nowhere", tmp_path, trial.requests, trial.expected)
    with pytest.raises(EngineFailure, match="rankd-openvino-fp32-cold with 2 threads: ArtifactError"):
        compete(broken, choose(["rankd-openvino-fp32-cold"]), 2, 1, nothing)


def test_wrong_scores_are_not_timed(trial: Trial) -> None:
    wrong = [logits + 1 for logits in trial.expected]
    other = Trial(trial.workload, trial.about, trial.artifact, trial.scratch, trial.requests, wrong)
    results = compete(other, choose(["eager-fp32"]), 1, 1, nothing)
    assert results.reasons["eager-fp32"].startswith("its scores differ from torch by 1")
    assert results.calls_ms == {}


def test_a_process_that_dies_or_hangs_is_reported_and_gone(trial: Trial, tmp_path: Path) -> None:
    contestant = CONTESTANTS["rankd-openvino-fp32-cold"]
    with ContestantProcess(contestant, 1, tmp_path) as process:
        pid = process.pid
        os.kill(pid, 9)
        with pytest.raises(EngineFailure, match="rankd-openvino-fp32 ended with status -9 on Load: no message"):
            process.load(trial.artifact, trial.requests)
    assert gone(pid)
    with ContestantProcess(contestant, 1, tmp_path, timeout_s=0.01) as process:
        pid = process.pid
        with pytest.raises(EngineFailure, match=r"gave no answer to Load in 0\.01 s"):
            process.load(trial.artifact, trial.requests)
    assert gone(pid)
    with pytest.raises(EngineFailure, match="was not started"):
        process.time(contestant, 1)


def test_precision_that_the_processor_lacks_is_left_out(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "why_not", lambda target, precision: "no bf16" if precision is Precision.BF16 else "")
    results = compete(
        trial, choose(["rankd-openvino-bf16-cold", "rankd-openvino-bf16-warm", "eager-bf16"]), 1, 1, nothing
    )
    assert results.reasons == dict.fromkeys(
        ["eager-bf16", "rankd-openvino-bf16-cold", "rankd-openvino-bf16-warm"], "no bf16"
    )


def test_fast_path_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(EngineFailure, match="no C compiler"):
        fast_path_library(tmp_path)


def test_ratios_are_as_they_are_named() -> None:
    p50 = {
        "eager-fp32": 60.0,
        "eager-fp32-fast": 50.0,
        "eager-bf16": 30.0,
        "ort-fp32": 40.0,
        "rankd-openvino-bf16-cold": 10.0,
        "rankd-openvino-bf16-warm": 2.0,
    }
    assert best_peer(p50) == "eager-bf16"
    assert ratios(p50, Precision.BF16, FLOPS, {("", Precision.BF16): 800.0}) == {
        "speedup_cold": 6.0,
        "speedup_cold_tuned": 5.0,
        "speedup_warm": 30.0,
        "speedup_warm_tuned": 25.0,
        "over_best_peer_cold": 3.0,
        "peak_share": 0.5,
    }
    assert ratios(p50, Precision.FP32, FLOPS, {}) == {}
    assert best_peer({"eager-fp32": 1.0, "rankd-openvino-bf16-cold": 1.0}) is None


def test_operations_of_a_call_are_what_it_needs(workload: Workload) -> None:
    cold, warm, encode, extend = (work_flops(work, workload, 16.0) for work in Work)
    assert cold == pytest.approx(warm + encode)
    assert warm == workload.flops().candidates
    assert extend == pytest.approx(encode * 4 / 16)  # of one layer nobody reads the outputs: it is linear in T


def test_tables_for_people_name_who_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"contestant": f"c{n}", "threads": 1, "p50_ms": 1.5, "gflops_reached": 1.0, "gflop_needed": 1.0}
        for n in range(9)
    ]
    rows.append({"contestant": "gone", "threads": 1, "reason": "no [compiler]"})
    about = {"name": "w", "use": "tests", "flops": {"needed": 1e9}, "served": {"name": "m"}, "runs": 3}
    print_report(Report("engine", about, {"cpu": "c", "cores": 2}, "abc", {"c1": 0.0}, rows, {"speedup_cold": 2.0}))
    shown = capsys.readouterr().out
    for part in ("threads: 1, all calls of 3 runs", "c8", "gone left out: no [compiler]", "ratios: speedup_cold 2"):
        assert part in shown


def test_features_survive_the_pipe() -> None:
    features = Features(
        {"a": np.arange(6, dtype=np.int32).reshape(1, 2, 3)}, {"b": np.zeros((1, 0, 2), np.float32)}, num_candidates=0
    )
    again = unpack_features(pack_features(features))
    assert again.num_candidates == 0
    for before, after in ((features.history, again.history), (features.candidates, again.candidates)):
        assert list(before) == list(after)
        for name, array in before.items():
            assert after[name].dtype == array.dtype
            assert np.array_equal(after[name], array)
            assert after[name].flags.writeable
    assert pack(np.asarray([[1.5]], np.float32)) == Packed("<f4", (1, 1), b"\x00\x00\xc0\x3f")
    assert unpack(Packed("<i4", (2,), b"\x01\x00\x00\x00\xff\xff\xff\xff")).tolist() == [1, -1]


@pytest.fixture(scope="module")
def model(workload: Workload) -> Climber:
    torch.manual_seed(0)
    made = Climber(schema_of(workload), width=16, heads=2, layers=2, hidden=8).eval()
    for name, parameter in made.named_parameters():
        if name.endswith(("bias.position", "bias.time", "log_temperature")):
            torch.nn.init.normal_(parameter, std=0.5)
    return made


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.tuples(st.integers(0, 16), st.integers(0, 16)),
    pads=st.integers(0, 4),
    count=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_dense_model_computes_what_the_split_one_does(
    model: Climber, workload: Workload, lengths: tuple[int, int], pads: int, count: int, seed: int
) -> None:
    schema, random = schema_of(workload), np.random.default_rng(seed)
    sizes = {"B": 1, "T": max(*lengths, 1) + pads, "C": count}

    def drawn(name: str, dtype: str, shape: tuple[int | str, ...]) -> Array:
        size = [sizes[d] if isinstance(d, str) else d for d in shape]
        if name == "history_length":
            return np.asarray([lengths], np.int32)
        if name == "history_time":
            return np.sort(random.integers(0, 10**6, size), axis=-1).astype(np.int32)
        if name == "context_time":
            return np.full(size, 10**6 + int(random.integers(10**5)), np.int32)
        if dtype == "float32":
            return random.standard_normal(size).astype(np.float32)
        return random.integers(0, 2, size).astype(dtype)

    history, candidates = (
        {spec.name: torch.from_numpy(drawn(spec.name, spec.dtype, spec.shape)) for spec in specs}
        for specs in (history_specs(schema), candidate_specs(schema))
    )
    with torch.inference_mode():
        expected = model.score(model.encode(history), candidates)
        given_ = DenseRanker(model)(history, candidates)
    assert given_.shape == expected.shape == (1, count, 2)
    assert torch.allclose(given_, expected, atol=1e-5)
