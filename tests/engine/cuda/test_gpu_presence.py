"""What stands against the target `cuda` is said in words, before anything heavy is imported; what takes its place."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rankd.artifact import Artifact, EngineRecord
from rankd.demo import MODELS
from rankd.engine import targets
from rankd.engine.backend import EngineConfig, Precision
from rankd.engine.cuda import cuda_backend, gpu_presence
from rankd.errors import ArtifactError, ConfigError
from tests.engine.test_native_climber import OPTIONS, schema_of, shaped


class Driver:
    """libcuda with `gpus` GPUs of one compute capability."""

    def __init__(self, gpus: int, capability: tuple[int, int] = (9, 0), starts: int = 0) -> None:
        self.gpus, self.starts = gpus, starts
        self.attributes = {gpu_presence.MAJOR: capability[0], gpu_presence.MINOR: capability[1]}

    def cuInit(self, flags: int) -> int:  # noqa: N802 - the driver's name
        return self.starts

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802 - the driver's name
        count._obj.value = self.gpus
        return 0

    def cuDeviceGetAttribute(self, value: Any, which: int, device: int) -> int:  # noqa: N802 - the driver's name
        value._obj.value = self.attributes[which]
        return 0


def opened(driver: Driver | None) -> Callable[[str], Driver]:
    def open_driver(name: str) -> Driver:
        assert name == "libcuda.so.1"
        if driver is None:
            raise OSError(name)
        return driver

    return open_driver


@pytest.mark.parametrize(
    ("driver", "said"),
    [
        (None, "no NVIDIA driver"),
        (Driver(0), "no GPU to this process"),
        (Driver(1, starts=100), "no GPU to this process"),
        (Driver(1, (7, 5)), "compute capability 7.5; 8.0 or newer"),
        (Driver(2, (9, 0)), ""),
    ],
)
def test_says_what_the_machine_lacks(driver: Driver | None, said: str) -> None:
    reason = gpu_presence.why_not(opened(driver))
    assert said in reason
    assert bool(reason) == bool(said)


def test_says_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "triton" else object())
    assert gpu_presence.why_not(opened(Driver(1))) == "triton is not installed; install rankd[cuda]"


def test_says_which_models_it_does_not_run() -> None:
    schema = schema_of()
    assert targets.why_not_model("cuda", "climber", OPTIONS, schema) == ""
    assert targets.why_not_model("cuda", "climber", shaped(2, 2, ffn=40), schema) == ""
    for model, options, reason in (
        ("sasrec", OPTIONS, "sasrec"),
        ("climber", shaped(1, 2), "unequal sizes"),
        ("climber", shaped(2, 2, up_rank=8), "low rank"),
        ("climber", OPTIONS | {"shape": shaped(1, 1)["shape"] | {"repeats": 2}}, "shared 2 times"),
        ("climber", {"width": 1024, "heads": 2}, "a head is 512 wide"),
    ):
        assert reason in targets.why_not_model("cuda", model, options, schema)


def test_too_little_memory_is_refused_with_both_sizes() -> None:
    cuda_backend.check_memory(1 << 30, 1 << 30, 1 << 34)
    with pytest.raises(ConfigError, match=r"needs 2048 MiB .* 1024 of 16384 MiB are free"):
        cuda_backend.check_memory(1 << 31, 1 << 30, 1 << 34)


def built_for_cuda() -> Artifact:
    """The packaged model, as if a machine with a GPU had built it for that too."""
    packaged = Artifact.open(MODELS / "demo" / "1")
    engines = packaged.manifest.engines | {"cuda": EngineRecord("fp32", {"fp32": 0.0})}
    return Artifact(packaged.path, msgspec.structs.replace(packaged.manifest, engines=engines))


def test_without_a_gpu_the_target_is_refused_or_another_takes_its_place(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpu_presence, "why_not", lambda: "there is no GPU")
    artifact, config = built_for_cuda(), EngineConfig("cuda", Precision.FP32, executors=1)
    with pytest.raises(ArtifactError, match="cannot be served by cuda in fp32: there is no GPU"):
        targets.load_backend(artifact, config)
    with pytest.raises(ConfigError, match="Did you mean 'openvino'"):
        targets.load_backend(artifact, msgspec.structs.replace(config, fall_back="openvno"))
    with caplog.at_level(logging.WARNING, "rankd"):
        backend = targets.load_backend(artifact, msgspec.structs.replace(config, fall_back="openvino"))
    assert backend.target == "openvino"
    assert "openvino takes the place of cuda" in caplog.text
    assert "there is no GPU" in caplog.text
    assert targets.choose_target(artifact, EngineConfig(precision=Precision.FP32)) != "cuda"


def test_nothing_of_cuda_is_imported_where_it_is_not_used() -> None:
    code = (
        "import sys\nfrom rankd.engine.targets import runs_here\nruns_here('cuda')\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'triton')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert result.stdout.strip() == b"[]", result.stderr


def test_e4m3_needs_a_newer_gpu_than_the_rest() -> None:
    ampere = opened(Driver(1, (8, 6)))
    assert gpu_presence.why_not(ampere) == ""
    reason = gpu_presence.why_not(ampere, gpu_presence.LEAST_OF_FP8)
    assert reason == "the GPU has compute capability 8.6; 8.9 or newer is needed"


def test_every_kernel_compiles_for_an_h200(tmp_path: Path) -> None:
    """Triton brings the assembler: no GPU is needed, but a process in which nothing is interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(Path(__file__).parent / "compile_kernels.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    made = [msgspec.json.decode(line) for line in result.stdout.splitlines()]
    assert len(made) == 13
    for one in made:
        assert one["shared_bytes"] <= 227 << 10, one  # what a block of an H200 may have
