"""Models and versions come and go while others serve; events outlive a reload."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rankd import Event, Ranker, RankRequest
from rankd.errors import ArtifactError, ConfigError, InvalidRequest, NotFound, Unavailable
from rankd.serve.repository import ModelRepository, ModelState
from rankd.serve.settings import ServeConfig
from rankd.serve.v1 import rank_with
from tests.serve.conftest import ONE_EXECUTOR, copy_version, write_manifest

CONFIG = ServeConfig(engine=ONE_EXECUTOR)


@pytest.fixture
def root(demo_models: Path, tmp_path: Path) -> Path:
    """Two models; 'films' has two versions."""
    copy_version(demo_models / "demo" / "1", tmp_path, "films", "9")
    copy_version(demo_models / "demo" / "1", tmp_path, "films", "10")
    copy_version(demo_models / "demo" / "1", tmp_path, "other", "1")
    return tmp_path


@pytest.fixture
def repository(root: Path) -> Iterator[ModelRepository]:
    made = ModelRepository(root, CONFIG)
    made.start()
    yield made
    made.close()


def states(repository: ModelRepository) -> dict[tuple[str, str], ModelState]:
    return {(status.name, status.version): status.state for status in repository.index()}


def test_start_loads_the_newest_version_by_number(repository: ModelRepository) -> None:
    assert states(repository) == {
        ("films", "10"): ModelState.READY,
        ("films", "9"): ModelState.UNAVAILABLE,
        ("other", "1"): ModelState.READY,
    }
    assert repository.get("films").manifest.version == "10"
    with pytest.raises(InvalidRequest, match="films, other"):
        repository.get()
    with pytest.raises(Unavailable, match="not loaded"):
        repository.get("films", "9")


def test_two_versions_serve_at_once_and_one_can_go(repository: ModelRepository) -> None:
    repository.load("films", "9")
    assert repository.get("films").manifest.version == "10"
    assert repository.get("films", "9").manifest.version == "9"
    repository.unload("films", "10")
    assert repository.get("films").manifest.version == "9"
    repository.unload("films")
    with pytest.raises(Unavailable):
        repository.get("films")
    assert repository.get().manifest.name == "other"
    with pytest.raises(NotFound, match="not loaded"):
        repository.unload("films")


def test_events_outlive_a_reload(repository: ModelRepository) -> None:
    items = repository.get("films").catalogue.ids.items
    for item in items[:3]:
        repository.append_events("films", "someone", (Event(item, "like"),))
    before = repository.get("films").rank(RankRequest("someone", items[:9])).scores
    repository.unload("films")
    repository.load("films", "9")
    np.testing.assert_allclose(
        repository.get("films").rank(RankRequest("someone", items[:9])).scores, before, atol=1e-5
    )
    done = repository.append_events("films", "someone", (Event(items[5], "like"),))
    assert (done.stored, done.confirmed) == ({"9": 4}, True)


def test_appends_during_a_load_reach_the_new_version(repository: ModelRepository) -> None:
    items = repository.get("films").catalogue.ids.items
    loading = threading.Thread(target=repository.load, args=("films", "9"))
    loading.start()
    count = 0
    while loading.is_alive():
        repository.append_events("films", "busy", (Event(items[count % 50], "click"),))
        count += 1
    loading.join()
    for version in ("9", "10"):
        history = repository.get("films", version).features.stored_history("busy")
        assert history is not None
        assert len(history) == min(count, 500)


def test_events_without_a_time_happened_when_they_came(
    demo_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("1", "2"):
        copy_version(demo_models / "demo" / "1", tmp_path, "live", version, default_time="wall")
    repository = ModelRepository(tmp_path, CONFIG)
    repository.start()
    item = repository.get("live").catalogue.ids.items[0]
    monkeypatch.setattr("rankd.features.requests.time", SimpleNamespace(time=lambda: 1_900_000_000.5))
    repository.append_events("live", "someone", (Event(item), Event(item, time=1_800_000_000)))
    repository.load("live", "1")
    for version in ("1", "2"):
        history = repository.get("live", version).features.stored_history("someone")
        assert history is not None
        assert history.times.tolist() == [1_800_000_000, 1_900_000_000]
    repository.close()


def without_likes(demo_models: Path, root: Path, version: str) -> None:
    """A version that was built without the event type 'like', and has 'seen' in its place."""
    place = copy_version(demo_models / "demo" / "1", root, "mixed", version)
    write_manifest(place, (place / "model.toml").read_text().replace('"like"', '"seen"'))


def test_each_version_reads_the_events_that_it_knows_and_the_newest_decides(demo_models: Path, tmp_path: Path) -> None:
    without_likes(demo_models, tmp_path, "1")
    copy_version(demo_models / "demo" / "1", tmp_path, "mixed", "2")
    without_likes(demo_models, tmp_path, "3")
    repository = ModelRepository(tmp_path, CONFIG)
    try:
        repository.load("mixed", "2")
        item = repository.get("mixed").catalogue.ids.items[0]
        assert repository.append_events("mixed", "someone", (Event(item, "like"),)).stored == {"2": 1}
        repository.load("mixed", "1")
        assert repository.append_events("mixed", "someone", (Event(item, "like"),)).stored == {"2": 2}
        assert repository.append_events("mixed", "someone", (Event(item, "click"),)).stored == {"1": 1, "2": 3}
        repository.load("mixed", "3")
        with pytest.raises(InvalidRequest, match="like"):
            repository.append_events("mixed", "someone", (Event(item, "like"),))
        lengths = {v: len(repository.get("mixed", v).features.stored_history("someone") or ()) for v in "123"}
        assert lengths == {"1": 1, "2": 3, "3": 1}
    finally:
        repository.close()


def test_loading_and_unloading_disturbs_no_other_model(repository: ModelRepository) -> None:
    items = repository.get("other").catalogue.ids.items
    done, failures, answered = threading.Event(), [], []

    def rank_on() -> None:
        while not done.is_set():
            try:
                repository.get("other").rank(RankRequest("u", items[:8]))
                answered.append(1)
            except Exception as error:  # noqa: BLE001 - the test collects whatever goes wrong
                failures.append(error)

    threads = [threading.Thread(target=rank_on) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        repository.load("films", "9")
        repository.unload("films", "9")
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(answered) > 10


def test_a_damaged_version_is_refused_and_says_why(repository: ModelRepository, root: Path) -> None:
    with (root / "films" / "9" / "weights.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match="it was cut"):
        repository.load("films", "9")
    reason = {status.version: status.reason for status in repository.index() if status.name == "films"}["9"]
    assert "weights.safetensors" in reason
    assert repository.get("films").manifest.version == "10"


def test_a_load_that_fails_in_any_way_is_not_left_loading(
    repository: ModelRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Ranker:
        raise RuntimeError("the engine has a defect")

    monkeypatch.setattr(Ranker, "load", broken)
    with pytest.raises(RuntimeError):
        repository.load("films", "9")
    (status,) = (status for status in repository.index() if (status.name, status.version) == ("films", "9"))
    assert (status.state, status.reason) == (ModelState.UNAVAILABLE, "the engine has a defect")


def test_a_folder_has_the_name_of_its_model(repository: ModelRepository, root: Path) -> None:
    shutil.copytree(root / "films" / "10", root / "films" / "11")
    with pytest.raises(ArtifactError, match="name its folder films/10"):
        repository.load("films", "11")
    assert repository.get("films").manifest.version == "10"


def test_a_request_is_not_lost_between_two_versions(
    repository: ModelRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaving, staying = repository.get("films"), repository.load("films", "9")
    repository.unload("films", "10")
    found = iter([leaving, staying])  # what `get` answers when the unloading falls between it and `submit`
    monkeypatch.setattr(repository, "get", lambda *_: next(found))
    request = RankRequest("u", staying.catalogue.ids.items[:3], model="films")
    scores = asyncio.run(rank_with(repository, request, _still_there))
    assert scores.version == "9"


def test_nothing_ready_is_not_the_fault_of_the_request(root: Path) -> None:
    with pytest.raises(Unavailable, match="no model is ready"):
        ModelRepository(root, CONFIG).get()


def test_no_name_leads_out_of_the_folder(repository: ModelRepository) -> None:
    for name in ("..", "../films", "/", "films/10", ""):
        with pytest.raises(NotFound):
            repository.load(name)


def test_an_empty_folder_and_a_mixed_up_configuration(tmp_path: Path, root: Path) -> None:
    with pytest.raises(NotFound, match="rankd build"):
        ModelRepository(tmp_path / "nothing", CONFIG).start()
    with pytest.raises(ConfigError, match="name one in models"):
        ModelRepository(root, ServeConfig(histories="x.parquet")).start()


async def _still_there() -> dict[str, str]:
    """The client waits for its answer."""
    await asyncio.sleep(60)
    return {"type": "http.disconnect"}
