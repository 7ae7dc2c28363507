"""`target = "auto"`: what was measured on this machine decides, among what an artifact is built for."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankd.engine import machine_choice
from rankd.engine.machine_choice import choice_file, fastest_target, write_choice


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_the_fastest_of_the_usable_targets() -> None:
    assert fastest_target(["openvino", "onnxruntime"]) is None
    write_choice("base", {"openvino": 20.0, "onnxruntime": 30.0, "reference": 5.0})
    assert fastest_target(["openvino", "onnxruntime"]) == "openvino"
    assert fastest_target(["onnxruntime"]) == "onnxruntime"
    assert fastest_target(["elsewhere"]) is None


def test_another_machines_figures_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    write_choice("base", {"openvino": 20.0})
    monkeypatch.setattr(machine_choice, "this_machine", lambda: "another one")
    assert fastest_target(["openvino"]) is None


def test_a_damaged_file_is_nothing_measured() -> None:
    write_choice("base", {"openvino": 20.0})
    choice_file().write_text('{"machine": ')
    assert fastest_target(["openvino"]) is None
