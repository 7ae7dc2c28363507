"""Rankers with user states whose tables are beside the graph: in the ranker's process, and on real shards. Scores are
those of the tables in the graph, whatever is kept, appended, lost or exchanged."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from msgspec.structs import replace

from rankd import Event, Ranker, RankRequest, Scores
from rankd.build.outside_tables import write_tables
from rankd.cli import rankd
from rankd.embeddings.table_spec import TableStorage
from rankd.engine.backend import EngineConfig, Isolation
from rankd.errors import DeadlineExceeded, Unavailable
from rankd.models.protocol import EmbeddedModel
from rankd.shards.shard_config import TableDefault
from rankd.shards.table_config import TableConfig
from rankd.states.state_config import StateConfig
from tests.features.stores.redis_server import eventually
from tests.free_ports import free_port
from tests.shards.films import ENGINE, ITEMS, REQUESTS, USERS, build, made
from tests.shards.test_planned_serving import PATIENT, shard

KINDS = ("climber", "sasrec", "hstu")
NEW = "somebody new"
BOUND = 1e-5
WAYS: dict[str, TableStorage | None] = {
    "graph": None,
    "fp32": TableStorage.FP32,
    "int8": TableStorage.INT8,
    "int4": TableStorage.INT4,
}


class Versions:
    """Each kind with its tables in the graph, beside it in float32, and in int8: built when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __getitem__(self, which: tuple[str, str]) -> Path:
        kind, way = which
        place = self._root / f"{kind}-{way}"
        return place / "films" / "1" if place.exists() else build(place, kind, WAYS[way])


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Versions:
    """All of them."""
    return Versions(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Of the ranker."""
    name: str = request.param
    return name


def plan_of(version: Path, shards: int) -> Path:
    """Of a version's tables, none of them in the ranker's process."""
    path = version.parent / f"plan-{shards}.json"
    strategy = "one-shard" if shards == 1 else "load-balanced"
    arguments = ["plan", str(version), "--shards", str(shards), "--strategy", strategy, "--replicate", "0"]
    done = CliRunner().invoke(rankd, [*arguments, "--out", str(path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return path


@contextmanager
def sharded(version: Path, shards: int) -> Iterator[TableConfig]:
    """Shards in processes of their own, as users start them; the last one has its parts alone on disk."""
    plan, folders = plan_of(version, shards), [version / "embeddings"] * (shards - 1)
    with ExitStack() as running:
        own = Path(running.enter_context(TemporaryDirectory()))
        arguments = ["shard", "split", str(plan), str(version / "embeddings"), "--shard", str(shards - 1)]
        done = CliRunner().invoke(rankd, [*arguments, "--out", str(own)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        addresses = tuple(
            running.enter_context(shard(plan, folder, number))[0] for number, folder in enumerate([*folders, own])
        )
        yield TableConfig(plan=str(plan), shards=addresses, client=PATIENT)


def extend_always(ranker: Ranker) -> None:
    """Whatever was measured at warm-up."""
    ranker.states.extend_up_to(dict.fromkeys(ranker.schema.history_buckets, 32 if ranker.manifest.extends else 0))


def lived(ranker: Ranker) -> list[Scores]:
    """Requests of old users and of one whose events come meanwhile; each request twice."""
    extend_always(ranker)
    answers = [ranker.rank(request) for request in REQUESTS for _ in range(2)]
    kinds, end = ranker.schema.event_types, ranker.schema.log_end
    for number in range(4):
        ranker.append_events(NEW, (Event(ITEMS[number], kinds[0], end - 50 + number),))
        answers += [ranker.rank(RankRequest(NEW, ITEMS[:20])) for _ in range(2)]
    return answers


def check(ranker: Ranker, expected: list[Scores], bound: float = BOUND) -> list[str]:
    """The scores are the expected ones; where states came from."""
    answers = lived(ranker)
    for answer, one in zip(answers, expected, strict=True):
        np.testing.assert_allclose(answer.scores, one.scores, rtol=bound, atol=bound)
        assert answer.degraded == one.degraded == ()
    return [answer.state for answer in answers]


@pytest.fixture(scope="module")
def expected(versions: Versions, kind: str) -> list[Scores]:
    """What the tables in the graph give."""
    with Ranker.load(versions[kind, "graph"], ENGINE) as ranker:
        return lived(ranker)


@pytest.mark.parametrize("isolation", Isolation)
def test_tables_in_the_process_give_the_scores_of_those_in_the_graph(
    versions: Versions, kind: str, expected: list[Scores], isolation: Isolation
) -> None:
    engine = replace(ENGINE, isolation=isolation)
    with Ranker.load(versions[kind, "fp32"], engine) as ranker:
        assert check(ranker, expected) == [answer.state for answer in expected]
        assert ranker.state_counts().origins["cached"] >= len(REQUESTS)
    with Ranker.load(versions[kind, "fp32"], engine, states=StateConfig(budget_mib=0)) as ranker:
        assert set(check(ranker, expected)) == {"encoded"}


@pytest.mark.parametrize("shards", [1, 2])
def test_tables_on_shards_give_the_scores_of_those_in_the_graph(
    versions: Versions, kind: str, expected: list[Scores], shards: int
) -> None:
    version = versions[kind, "fp32"]
    with sharded(version, shards) as tables, Ranker.load(version, ENGINE, tables=tables) as ranker:
        assert check(ranker, expected) == [answer.state for answer in expected]
        figures = ranker.table_figures()
        assert figures is not None
        assert figures.calls["calls"] <= shards * figures.lookups, "a history's rows come with its candidates'"
        assert figures.lookups == len(expected)


def test_tables_beside_the_graph_of_another_engine(versions: Versions, kind: str, tmp_path: Path) -> None:
    """ONNX Runtime, in the process and on a shard, as OpenVINO with the tables in the graph."""
    with Ranker.load(versions[kind, "graph"], ENGINE) as ranker:
        expected = lived(ranker)
    version, engine = build(tmp_path, kind, targets=("onnxruntime",)), replace(ENGINE, target="onnxruntime")
    with Ranker.load(version, engine) as ranker:
        check(ranker, expected, 1e-4)
    with sharded(version, 1) as tables, Ranker.load(version, engine, tables=tables) as ranker:
        check(ranker, expected, 1e-4)


@pytest.mark.parametrize(("kind", "storage"), [("climber", "int8"), ("sasrec", "int8"), ("climber", "int4")])
def test_small_integers_on_shards_are_what_they_are_here(versions: Versions, kind: str, storage: str) -> None:
    version = versions[kind, storage]
    with Ranker.load(versions[kind, "fp32"], ENGINE) as ranker:
        exact = lived(ranker)
    with Ranker.load(version, ENGINE) as ranker:
        here = lived(ranker)
    assert max(np.abs(a.scores - b.scores).max() for a, b in zip(here, exact, strict=True)) > BOUND
    with sharded(version, 2) as tables, Ranker.load(version, ENGINE, tables=tables) as ranker:
        check(ranker, here, 1e-6)


@pytest.mark.parametrize("kind", ["climber", "sasrec"])
def test_a_state_of_defaults_is_never_kept(versions: Versions, kind: str) -> None:
    """A shard is lost and comes back; meanwhile states that were right are still used, and no other is made."""
    version, old, other = versions[kind, "fp32"], REQUESTS[0], REQUESTS[1]
    with Ranker.load(version, ENGINE) as ranker:
        extend_always(ranker)
        right = {request.user_id: ranker.rank(request).scores for request in (old, other)}
    names = sorted(file.stem for file in (version / "embeddings").iterdir())
    defaults = tuple(TableDefault(name) for name in names)
    plan, port = plan_of(version, 1), free_port()
    with ExitStack() as running:
        address, process = running.enter_context(shard(plan, version / "embeddings", 0, "--port", str(port)))
        client = replace(PATIENT, defaults=defaults)
        tables = TableConfig(plan=str(plan), shards=(address,), client=client)
        lenient = running.enter_context(Ranker.load(version, ENGINE, tables=tables))
        strict = running.enter_context(
            Ranker.load(version, ENGINE, tables=TableConfig(plan=str(plan), shards=(address,), client=PATIENT))
        )
        for ranker in (lenient, strict):
            extend_always(ranker)
        np.testing.assert_allclose(lenient.rank(old).scores, right[old.user_id], rtol=BOUND, atol=BOUND)
        process.kill()
        process.wait()
        for request, state in ((old, "cached"), (other, "encoded"), (other, "encoded")):
            answer = eventually(partial(degraded, lenient, request), "the loss is noticed")
            assert (answer.state, sorted(answer.degraded)) == (state, [f"table_{name}" for name in names])
            assert np.isfinite(answer.scores).all()
        assert lenient.states.has(old.user_id)
        assert not lenient.states.has(other.user_id)
        with pytest.raises((Unavailable, DeadlineExceeded)):
            strict.rank(other)
        assert not strict.states.has(other.user_id)
        running.enter_context(shard(plan, version / "embeddings", 0, "--port", str(port)))
        back = eventually(lambda: whole(lenient, other), "the shard is asked again")
        assert back.state == "encoded"
        np.testing.assert_allclose(back.scores, right[other.user_id], rtol=BOUND, atol=BOUND)
        again = lenient.rank(old)
        assert again.state == "cached", "the shard has the rows that it had"
        np.testing.assert_allclose(again.scores, right[old.user_id], rtol=BOUND, atol=BOUND)


def degraded(ranker: Ranker, request: RankRequest) -> Scores | None:
    answer = ranker.rank(request)
    return answer if answer.degraded else None


def whole(ranker: Ranker, request: RankRequest) -> Scores | None:
    answer = ranker.rank(request)
    return None if answer.degraded else answer


@pytest.mark.parametrize("kind", ["climber", "sasrec"])
def test_a_state_is_of_the_tables_that_it_was_made_of(versions: Versions, kind: str, tmp_path: Path) -> None:
    """A shard that comes back with other rows, and states on disk that were made of those before."""
    version, port, request = versions[kind, "fp32"], free_port(), REQUESTS[0]
    other = other_rows(version, kind, tmp_path / "models" / "1")
    with Ranker.load(other, ENGINE) as ranker:
        expected = ranker.rank(request).scores
    plan, spill = plan_of(version, 1), StateConfig(spill=str(tmp_path / "states"))
    with ExitStack() as running:
        address, process = running.enter_context(shard(plan, version / "embeddings", 0, "--port", str(port)))
        tables = TableConfig(plan=str(plan), shards=(address,), client=PATIENT)
        ranker = running.enter_context(Ranker.load(version, ENGINE, states=spill, tables=tables))
        before = [ranker.rank(request) for _ in range(2)]
        assert [answer.state for answer in before] == ["encoded", "cached"]
        assert np.abs(before[0].scores - expected).max() > 100 * BOUND
        process.terminate()
        assert process.wait(20) == 0
        running.enter_context(shard(plan, other / "embeddings", 0, "--port", str(port)))
        eventually(lambda: answered(ranker, REQUESTS[1]), "the shard is asked again")
        answer = ranker.rank(request)  # the first one of this user: one that failed might have kept the new state
        assert answer.state == "encoded"
        np.testing.assert_allclose(answer.scores, expected, rtol=BOUND, atol=BOUND)
        eventually(lambda: ranker.rank(request).state == "cached", "a state of the other rows is kept")
    with Ranker.load(version, ENGINE, states=spill) as ranker:  # its own tables again
        back = ranker.rank(request)
    assert back.state == "encoded"
    np.testing.assert_allclose(back.scores, before[0].scores, rtol=BOUND, atol=BOUND)
    with Ranker.load(version, ENGINE, states=spill) as ranker:
        assert ranker.rank(request).state == "restored"


def other_rows(version: Path, kind: str, copy: Path) -> Path:
    """The version with tables of other numbers."""
    shutil.copytree(version, copy)
    shutil.rmtree(copy / "embeddings")
    model = made(kind)
    assert isinstance(model, EmbeddedModel)
    with torch.no_grad():
        for table in model.tables().values():
            table *= -1.5
    write_tables(copy, model, TableStorage.FP32)
    return copy


def answered(ranker: Ranker, request: RankRequest) -> Scores | None:
    try:
        return ranker.rank(request)
    except (Unavailable, DeadlineExceeded):
        return None


def test_many_users_at_once_are_answered_as_one_by_one(versions: Versions, kind: str) -> None:
    """Requests overlap each other's shards, users share calls, and some are there several times."""
    requests = [RankRequest(USERS[n % 9], ITEMS[n % 7 : n % 7 + 12]) for n in range(60)]
    with Ranker.load(versions[kind, "graph"], ENGINE) as ranker:
        expected = [ranker.rank(request).scores for request in requests]
    version, engine = versions[kind, "fp32"], EngineConfig(executors=2)
    with sharded(version, 2) as tables, Ranker.load(version, engine, tables=tables) as ranker:
        for future, scores in zip([ranker.submit(request) for request in requests], expected, strict=True):
            np.testing.assert_allclose(future.result(60).scores, scores, rtol=1e-4, atol=1e-4)
