"""Artifacts appear whole or not at all, and nothing damaged is ever loaded."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankd import Ranker
from rankd.artifact import Artifact, Manifest, list_versions, write_artifact
from rankd.engine.backend import EngineConfig, Precision
from rankd.errors import ArtifactError, ConfigError


@pytest.fixture
def copied(demo_models: Path, tmp_path: Path) -> Path:
    place = tmp_path / "demo" / "1"
    shutil.copytree(demo_models / "demo" / "1", place)
    return place


def test_the_packaged_artifact_is_whole(demo_models: Path) -> None:
    artifact = Artifact.open(demo_models / "demo")
    assert artifact.manifest.version == "1"
    on_disk = {str(p.relative_to(artifact.path)) for p in artifact.path.rglob("*") if p.is_file()}
    assert on_disk == {*artifact.manifest.files, "model.toml", "model.toml.sha256"}
    assert artifact.manifest.engines["openvino"].parity["fp32"] < 1e-3


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_refused(copied: Path, data: st.DataObject) -> None:
    files = sorted(str(p.relative_to(copied)) for p in copied.rglob("*") if p.is_file())
    victim = copied / data.draw(st.sampled_from(files))
    whole = victim.read_bytes()
    how = data.draw(st.sampled_from(["cut", "flip", "grow", "remove"]))
    at = data.draw(st.integers(0, len(whole) - 1))
    if how == "cut":
        victim.write_bytes(whole[:at])
    elif how == "flip":
        victim.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[at + 1 :])
    elif how == "grow":
        victim.write_bytes(whole + b"\0")
    else:
        victim.unlink()
    try:
        if victim.name == "model.toml.sha256" and how in ("grow", "flip", "cut") and _same_digest(victim, whole):
            return  # the file name behind the checksum is not read
        with pytest.raises(ArtifactError):
            Artifact.open(copied)
    finally:
        victim.write_bytes(whole)
    Artifact.open(copied)


def _same_digest(path: Path, whole: bytes) -> bool:
    words, expected = path.read_bytes().split(), whole.split()
    return bool(words) and words[0] == expected[0]


def test_an_interrupted_write_leaves_nothing_that_loads(demo_models: Path, tmp_path: Path) -> None:
    def fill(folder: Path) -> Manifest:
        (folder / "half").write_text("done")
        assert list_versions(tmp_path / "m") == []
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_artifact(tmp_path, "m", "1", fill)
    assert list((tmp_path / "m").iterdir()) == []
    with pytest.raises(ArtifactError, match="no model version here"):
        Artifact.open(tmp_path / "m")


def test_a_process_killed_while_writing_leaves_nothing_that_loads(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:

        def fill(folder: Path) -> Manifest:
            (folder / "model.toml").write_text("format = 1")
            os._exit(9)

        write_artifact(tmp_path, "m", "1", fill)
    os.waitpid(child, 0)
    assert list_versions(tmp_path / "m") == []


def test_versions_are_immutable_and_ordered_by_number(copied: Path) -> None:
    with pytest.raises(ArtifactError, match="immutable"):
        write_artifact(copied.parents[1], "demo", "1", lambda folder: pytest.fail("must not be called"))
    for version in ("10", "9", "beta"):
        shutil.copytree(copied, copied.parent / version)
    assert list_versions(copied.parent) == ["1", "9", "10", "beta"]


def test_an_engine_that_was_not_built_is_refused(demo_models: Path) -> None:
    with pytest.raises(ConfigError, match="unknown target 'tensorrt'"):
        Ranker.load(demo_models / "demo", EngineConfig(target="tensorrt"))
    with pytest.raises(ArtifactError, match="was built for openvino, not for onnxruntime"):
        Ranker.load(demo_models / "demo", EngineConfig(target="onnxruntime"))


def test_bf16_where_the_processor_has_it(demo_models: Path, demo_ranker: Ranker) -> None:
    import numpy as np

    from rankd import RankRequest
    from rankd.engine.openvino_backend import why_not

    if why_not(Precision.BF16):
        pytest.skip("this processor has no bfloat16")
    request = RankRequest(demo_ranker.catalogue.ids.users[0], demo_ranker.catalogue.ids.items[:50])
    with Ranker.load(demo_models / "demo", EngineConfig(precision=Precision.BF16, executors=1)) as ranker:
        scores = ranker.rank(request).scores
    exact = demo_ranker.rank(request).scores
    assert 0 < np.abs(scores - exact).max() < 0.2
