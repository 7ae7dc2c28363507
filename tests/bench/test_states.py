"""The suite `states`: traces replayed against the real cache; what comes out keeps the contract."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from rankd.bench.state_suite import states as suite
from rankd.bench.state_suite.states import Subject, replay, sample
from rankd.bench.state_suite.traces import log_trace, zipf_trace
from rankd.bench.synthetic_model import build_model, catalogue_of
from rankd.bench.workload import Workload, read_workload
from rankd.cli.benchmarks import bench
from rankd.engine.backend import Precision
from rankd.errors import ConfigError
from rankd.features.catalogue import Catalogue
from rankd.states.state_config import Policy, Storage
from tests.bench.test_engine import TINY
from tests.train.small_log import small_frame


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    path = tmp_path_factory.mktemp("workload") / "tiny.toml"
    path.write_text(TINY.replace("history = [16]", "history = [8, 16]"))
    return read_workload(path)


@pytest.fixture(scope="module")
def subject(workload: Workload, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    from rankd.artifact import Artifact

    artifact = Artifact.open(build_model(workload, tmp_path_factory.mktemp("built")))
    catalogue: Catalogue = catalogue_of(workload)
    visits = zipf_trace(workload, artifact.schema, catalogue.ids.users, catalogue.ids.items, 400)
    return Subject(artifact, catalogue, visits, Precision.FP32, Storage.AUTO)


def test_more_memory_never_hurts_and_all_of_it_misses_only_first_visits_and_slides(subject: Subject) -> None:
    size = subject.layout.size_bytes(16)
    rates = [replay(subject, Policy.LRU, users * size).hit_rate for users in (1, 4, 16, 40)]
    assert rates == sorted(rates)
    everything = replay(subject, Policy.LRU, None)
    assert everything.evicted == 0
    assert everything.hit_rate >= rates[-1] > rates[0]
    assert sum(everything.origins.values()) == 400
    assert everything.users == len({visit.user_id for visit in subject.visits})
    assert everything.origins["extended"] > 0


def test_the_same_seed_gives_the_same_trace(workload: Workload, subject: Subject) -> None:
    again = zipf_trace(workload, subject.artifact.schema, subject.catalogue.ids.users, subject.catalogue.ids.items, 400)
    assert again == subject.visits


def test_a_log_is_replayed_basket_by_basket_in_its_order(subject: Subject, tmp_path: Path) -> None:
    frame = small_frame()
    frame.write_parquet(tmp_path / "log.parquet")
    visits = log_trace(tmp_path / "log.parquet", "demo", subject.artifact.schema, subject.catalogue.ids.items)
    assert [visit.time for visit in visits] == sorted(visit.time for visit in visits)
    assert len({visit.user_id for visit in visits}) <= 80
    assert sum(len(visit.events) for visit in visits) <= frame.height
    assert all(visit.events for visit in visits)
    with pytest.raises(ConfigError, match="--describe"):
        log_trace(tmp_path / "log.parquet", "", subject.artifact.schema, subject.catalogue.ids.items)


def test_states_ends_with_the_contract(
    workload: Workload, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.toml"
    file.write_text(TINY.replace("history = [16]", "history = [8, 16]"))
    monkeypatch.setattr(suite, "model_for", lambda *_: ("random weights", subject.artifact.path))
    picture = tmp_path / "states.png"
    arguments = ["states", "--workload", str(file), "--visits", "200", "--requests", "40", "--json"]
    done = CliRunner().invoke(bench, [*arguments, "--picture", str(picture)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout.splitlines()[-1])
    assert set(document) == {"suite", "workload", "machine", "commit", "parity", "results", "ratios"}
    assert document["suite"] == "states"
    assert all(worst < 1 for worst in document["parity"].values())
    hits = [row for row in document["results"] if row.get("policy") == "lru"]
    assert [row["hit_rate"] for row in hits] == sorted(row["hit_rate"] for row in hits)
    timed = [row for row in document["results"] if "p50_ms" in row]
    assert timed[0]["hit_rate"] == 0.0
    assert timed[1]["hit_rate"] > 0.0
    assert document["workload"]["served"]["states_per_gib"] > 0
    assert set(document["ratios"]) == {"segmented_over_lru_hits", "latency_gain"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    for place in (tmp_path / "picture.txt", tmp_path / "nowhere" / "picture.png"):
        with pytest.raises(ConfigError, match="--picture"):
            CliRunner().invoke(bench, ["states", "--picture", str(place)], catch_exceptions=False)


def test_a_sample_keeps_users_whole(subject: Subject) -> None:
    kept, share = sample(subject.visits, 100)
    assert share == 0.25
    users = {visit.user_id for visit in kept}
    assert kept == [visit for visit in subject.visits if visit.user_id in users]
    assert 0 < len(users) < len({visit.user_id for visit in subject.visits})
    assert sample(subject.visits, 10_000) == (subject.visits, 1.0)
