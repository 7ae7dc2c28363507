"""The file of a deployment: what it may say, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankd.deploy import local_ray, ray_session
from rankd.deploy.deployment import Deployment, read_deployment
from rankd.errors import ConfigError, MissingExtra

LINES = ('name = "films"', 'models = "models"', 'plan = "plan.json"', 'tables = "models"')


def written(folder: Path, *lines: str) -> Path:
    (folder / "models").mkdir(exist_ok=True)
    (folder / "plan.json").touch()
    (folder / "films.toml").write_text("\n".join(lines))
    return folder / "films.toml"


def test_paths_are_those_beside_the_file(tmp_path: Path) -> None:
    found = read_deployment(written(tmp_path, *LINES, "replicas = 2"))
    assert found == Deployment(
        "films", str(tmp_path / "models"), str(tmp_path / "plan.json"), str(tmp_path / "models"), replicas=2
    )


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("replica = 2", "Did you mean 'replicas'"),
        ("replicas = 0", "replicas"),
        ("shard.memory = 'much'", "shard.memory: 'much' is no size"),
        ("server.ports = [9000, 8000]", "server.ports is"),
        ("server.config = 'rankd.toml'", "server.config is 'rankd.toml', and there is no"),
        ("watch.misses = 0", "misses"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint.replace("[", r"\[")):
        read_deployment(written(tmp_path, *LINES, line))


def test_a_name_is_one_that_ray_takes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name"):
        read_deployment(written(tmp_path, 'name = "Films!"', *LINES[1:]))


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (local_ray, ray_session):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    for needs_ray in (lambda: ray_session.connect("auto"), local_ray.start_local):
        with pytest.raises(MissingExtra, match=r"rankd\[cluster\]"):
            needs_ray()
