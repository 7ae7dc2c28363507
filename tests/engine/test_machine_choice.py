"""`target = "auto"`: what was measured on this machine decides, among what an artifact is built for."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from rankd.artifact import Artifact, EngineRecord
from rankd.build.pack import BuildOptions, Contents, pack
from rankd.demo import MODELS
from rankd.engine import machine_choice, targets
from rankd.engine.backend import EngineConfig, Precision
from rankd.engine.machine_choice import choice_file, fastest_target, write_choice
from rankd.engine.native import support as native
from rankd.engine.targets import choose_target, load_backend
from rankd.features.assembly import assemble
from rankd.features.catalogue import Catalogue, Ids, UserTable
from rankd.models.protocol import create_model
from tests.features.sample_schema import DAY, make_history, make_items, make_schema, make_user


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


FP32, BF16 = Precision.FP32, Precision.BF16


def test_the_fastest_of_the_usable_targets_in_its_precision() -> None:
    assert fastest_target({"openvino": FP32, "onnxruntime": FP32}) is None
    write_choice("base", {"openvino fp32": 30.0, "openvino bf16": 15.0, "onnxruntime fp32": 20.0, "native bf16": 10.0})
    assert fastest_target({"openvino": FP32, "onnxruntime": FP32}) == "onnxruntime"
    assert fastest_target({"openvino": BF16, "onnxruntime": FP32}) == "openvino"
    assert fastest_target({"openvino": BF16, "native": BF16}) == "native"
    assert fastest_target({"elsewhere": FP32}) is None


def test_another_machines_figures_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    write_choice("base", {"openvino fp32": 20.0})
    assert fastest_target({"openvino": FP32}) == "openvino"
    monkeypatch.setattr(machine_choice, "this_machine", lambda: "another one")
    assert fastest_target({"openvino": FP32}) is None


def test_a_damaged_file_is_nothing_measured() -> None:
    write_choice("base", {"openvino fp32": 20.0})
    choice_file().write_text('{"machine": ')
    assert fastest_target({"openvino": FP32}) is None


def test_auto_takes_what_was_measured_among_what_is_built(tmp_path: Path) -> None:
    """An artifact for two targets: the file decides; without a file the first one."""
    schema = make_schema()
    model = create_model("climber", schema, {"width": 16, "heads": 2, "layers": 1, "hidden": 8}).eval()
    ids = Ids(tuple(map(str, range(30))), ("",) * 30, ("u",), {})
    users = UserTable(
        np.zeros((1, 1), np.int32), np.zeros((1, 0), np.float32), np.asarray([0, 3]), make_history([5, 6, 7])
    )
    catalogue = Catalogue(ids, make_items(), users)
    rows = np.asarray([3, 4], np.int32)
    requests = [assemble(schema, make_items(), make_history([5, 6]), rows, make_user(), 100 * DAY)] * 2
    contents = Contents(model, "climber", schema, catalogue, requests, {"width": 16})
    place = pack(tmp_path, contents, BuildOptions("m", "1", targets=("openvino", "onnxruntime")))
    artifact = Artifact.open(place)
    assert choose_target(artifact, EngineConfig()) == "openvino"
    write_choice("base", {"openvino fp32": 20.0, "onnxruntime fp32": 10.0, "native bf16": 1.0})
    assert choose_target(artifact, EngineConfig()) == "onnxruntime"
    assert choose_target(artifact, EngineConfig(target="openvino")) == "openvino"
    assert load_backend(artifact, EngineConfig()).target == "onnxruntime"


def test_where_nothing_was_measured_amx_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide model in bfloat16, built for the native engine and for OpenVINO."""
    built = {target: EngineRecord("bf16", {"fp32": 0.0, "bf16": 0.0}) for target in ("native", "openvino")}
    demo = Artifact.open(MODELS / "demo" / "1")
    artifact = Artifact(demo.path, msgspec.structs.replace(demo.manifest, engines=built))
    monkeypatch.setattr(targets, "why_not", lambda target, precision: "")
    for outdone, chosen in ((False, "native"), (True, "openvino")):
        monkeypatch.setattr(native, "outdone", lambda options, outdone=outdone: outdone)
        assert choose_target(artifact, EngineConfig()) == chosen
    write_choice("base", {"openvino bf16": 20.0, "native bf16": 10.0})
    assert choose_target(artifact, EngineConfig()) == "native"
