"""benchmarks/gpu.py refuses kindly where there is no GPU, and its inputs are what a model takes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from rankd.artifact import Artifact
from rankd.bench.workload import load_workload
from rankd.demo import MODELS
from rankd.engine.backend import EngineConfig, Precision, StateType
from rankd.engine.cuda import gpu_presence
from rankd.engine.cuda.pinned_memory import PinnedMemory
from rankd.engine.reference_backend import ReferenceBackend
from rankd.errors import EngineFailure
from rankd.types import UserState
from tests.engine.cuda.interpreted_device import InterpretedDevice
from tests.engine.cuda.test_cuda_executor import OPTIONS, made, near
from tests.engine.test_native_climber import candidates_of, history_of, schema_of

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _beside_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


@pytest.fixture
def script() -> Any:
    return importlib.import_module("gpu")


@pytest.fixture
def asked() -> Any:
    return importlib.import_module("gpu_requests")


@pytest.fixture
def place() -> Any:
    return importlib.import_module("gpu_place")


def test_refuses_kindly_without_a_gpu(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_presence, "why_not", lambda: "there is no NVIDIA driver")
    monkeypatch.setattr("sys.argv", ["gpu.py", "--out", str(tmp_path / "gpu.json")])
    assert script.main() == 2
    said = capsys.readouterr().out
    assert "Nothing was measured: there is no NVIDIA driver" in said
    assert not (tmp_path / "gpu.json").exists()


def test_a_part_that_fails_is_named_and_the_others_go_on(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: dict[str, Any] = {"failed": {}}
    attempt = script.Attempts(parts, tmp_path / "gpu.json")
    assert attempt("first", lambda: 1 // 0) is None
    assert attempt("second", lambda: {"ms": 1.0}) == {"ms": 1.0}
    assert json.loads((tmp_path / "gpu.json").read_text()) == parts  # after each part
    assert parts["failed"]["first"].startswith("ZeroDivisionError")
    monkeypatch.setattr(script, "BEGIN_BEFORE", -1.0)
    assert attempt("third", lambda: 1) is None
    assert parts["failed"]["third"] == "no time left"


def test_its_inputs_are_scored(place: Any) -> None:
    artifact = Artifact.open(MODELS / "demo" / "1")
    executor = ReferenceBackend.load(artifact, EngineConfig(), Precision.FP32, StateType.FP32).executor()
    histories, candidates = place.inputs_of(artifact, load_workload("small"), 2)
    lengths = [tuple(history["history_length"][0].tolist()) for history in histories]
    states = [UserState(executor.encode(one), length) for one, length in zip(histories, lengths, strict=True)]
    logits = executor.score(states, candidates)
    assert logits.shape == (2, 200, 2)
    assert np.isfinite(logits).all()


def test_our_calls_give_the_same_scores_with_states_made_found_and_sent(asked: Any) -> None:
    schema = schema_of(1)
    device = InterpretedDevice()
    memory = PinnedMemory(device)
    _, executor, _ = made(schema, OPTIONS | {"layers": 1}, torch.float32, device, memory=memory)
    backend = SimpleNamespace(executor=lambda: executor, host_memory=memory.allocate)
    histories = [history_of(schema, 8, [length], length) for length in (8, 5)]
    candidates = {name: np.concatenate([array] * 2) for name, array in candidates_of(schema, 3).items()}
    calls = asked.rankd_calls(backend, histories, candidates)
    cold = calls["rankd cold"]()
    assert device.done.count("out kernel") == 2  # the marked ones, and these
    near(calls["rankd cold, staged"](), cold, 1e-6)
    transfers = []
    for name in ("rankd warm", "rankd warm, states sent", "rankd warm, states staged"):
        before = device.counts["transfers"]
        near(calls[name](), cold, 1e-6)
        transfers.append(device.counts["transfers"] - before)
    assert transfers == [2, 3, 4]


def test_it_notices_who_ranks_worse(
    place: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The processor in place of the GPU ranks as well as itself; with scores that are turned round it does not."""
    ranking = importlib.import_module("gpu_ranks")
    monkeypatch.setattr(gpu_presence, "why_not", lambda: "")
    monkeypatch.setattr("sys.argv", ["gpu_ranks.py", "--events", "40"])
    events = ranking.demo_events(40)
    monkeypatch.setattr(ranking, "demo_events", lambda count: events)
    backend = ReferenceBackend.load(
        Artifact.open(MODELS / "demo" / "1"), EngineConfig(), Precision.FP32, StateType.FP32
    )

    class TurnedRound:
        """Its executors answer with the worst first."""

        def executor(self) -> Any:
            inner = backend.executor()
            return SimpleNamespace(encode=inner.encode, score=lambda *call: -inner.score(*call))

    for on_gpu, code in ((backend, 0), (TurnedRound(), 1)):
        loaded = {"cuda": on_gpu, "openvino": backend}
        for module in (ranking, place):
            monkeypatch.setattr(module, "load_backend", lambda _, config, loaded=loaded: loaded[config.target])
        assert ranking.main() == code
        found = json.loads(capsys.readouterr().out)
        assert found["events"] == 40
        assert set(found["gpu"]) == {"bf16", "fp8"}
        assert (found["gpu"]["bf16"]["largest_score_difference"] > 0) == bool(code)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_it_runs_from_end_to_end_in_the_interpreter(script: Any, place: Any, tmp_path: Path) -> None:
    """All that is measured of a workload, as `--rehearse` does it: whoever has a GPU should not meet the first typo."""
    workload = place.rehearsal()[1]
    one_layer = msgspec.structs.replace(workload, model=msgspec.structs.replace(workload.model, layers=1))
    parts: dict[str, Any] = {"failed": {}, "limits": script.limits(place.PROCESSOR)}
    script.whole_requests(place.PROCESSOR, one_layer, script.Attempts(parts, tmp_path / "gpu.json"), tmp_path)
    assert parts["failed"] == {}
    compiled = script.beside_compiled(place.PROCESSOR, one_layer, tmp_path)
    assert set(compiled["ms"]) > {"rankd cold", "torch.compile bf16, dense mask"}
    for users in (1, 2):
        figures = parts[f"hstu of {users}"]
        assert max(figures["parity"].values()) < 0.01
        assert {name for name, value in figures.items() if value is None} == {"over_best_peer_cold"}
        assert list(figures["left_out"]) == ["sdpa bf16, dense mask"]  # there is no softmax in an HSTU
    assert parts["hstu in flight"]["dso_gain"] > 0
    assert set(parts["hstu attention"]) == {
        f"{what} {kind}" for what in ("history", "candidates") for kind in ("bf16", "fp8")
    }


def test_a_contestant_with_other_scores_is_left_out(asked: Any) -> None:
    assert asked.differs(np.zeros(2), np.array([0.1, -0.2])) == pytest.approx(0.2)
    for wrong in (1.0, np.nan):
        with pytest.raises(EngineFailure, match="its scores differ from torch by"):
            asked.differs(np.zeros(2), np.array([0.0, wrong]))
