"""A model with lighter variants, real versions behind real sockets: who answers under too much load and after it, what
says so, and that the full version serves whatever becomes of the variants."""

from __future__ import annotations

import logging
import re
import shutil
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tomli_w

from rankd import Event, Ranker, RankRequest
from rankd.build.pack import BuildOptions, build_artifact
from rankd.compress.compress_run import compress, read_compression, read_int8
from rankd.compress.compression_recipe import CompressionRecipe, FineTuning, Gate, Prune, Quantize, Structure
from rankd.config import read_config
from rankd.engine.backend import Precision
from rankd.errors import ConfigError, NotFound, Unavailable
from rankd.schedule.elastic_config import ElasticConfig
from rankd.serve import messages
from rankd.serve.elastic_model import ElasticModel
from rankd.serve.lifecycle import Server
from rankd.serve.repository import ModelRepository, ModelState
from rankd.serve.settings import ServeConfig
from rankd.train.run import open_run, weights_sha256
from tests.compress.trained_run import WIDE, train_small
from tests.features.stores.redis_server import eventually
from tests.serve.conftest import ONE_EXECUTOR, write_manifest

PATIENCE_S = 20.0
PRUNED = ElasticConfig(("1-pruned",))
SWITCHES = ("lighter", "full")


def config_of(elastic: ElasticConfig = PRUNED, **more: Any) -> ServeConfig:
    return ServeConfig(port=0, engine=ONE_EXECUTOR, elastic={"films": elastic}, **more)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """'films': version 1, and what was made of its run by pruning; beside it, in `int8`, the same quantized."""
    folder = tmp_path_factory.mktemp("elastic")
    run, small, root = train_small(folder, choice=WIDE), folder / "small", folder / "models"
    step = Prune(structures=(Structure.FFN,), flops=0.8, requests=16)
    quantize = Quantize(requests=24, min_requests=16, max_error=0.5)
    gate = Gate(bounds={"gauc": 0.2}, min_users=20, sampled=20)
    compress(run, CompressionRecipe((step,), finetune=FineTuning(0), quantize=quantize, gate=gate), small)
    for source, place, version, precision in (
        (run, root, "1", Precision.FP32),
        (small, root, "1-pruned", Precision.FP32),
        (small, root.with_name("int8"), "1-int8", Precision.INT8),
    ):
        about, dataset, model = open_run(source)
        made = read_compression(source)
        options = BuildOptions("films", version, precision, ("openvino",), int8=read_int8(source, made))
        build_artifact(
            place, model, dataset, about.recipe, options, compression=made, run_sha256=weights_sha256(source)
        )
    return root


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Server]:
    with Server(models, config_of()) as running:
        yield running


def elastic_of(repository: ModelRepository) -> ElasticModel:
    elastic = repository.elastic.of(repository.get("films"))
    assert elastic is not None
    return elastic


def current(repository: ModelRepository) -> str:
    return repository.elastic.figures()["films"].current


def figure(server: Server, name: str) -> float:
    """A line of /metrics."""
    lines = httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S).text.splitlines()
    return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(name)))


def histories_take(ranker: Ranker, ms: float) -> None:
    """What the schedule has seen of users without a state: their requests take so long."""
    for _ in range(200):
        ranker.schedule.rules.costs.saw_prepare(False, None, ms)


class Crowd:
    """Requests of which the first, for version `hold`, has the only core until `let_go`; each is sent when the one
    before has its place. Histories take `full_ms` and `variant_ms`, as far as the schedules know, and time goes by in
    leaps of `later`, as far as the elastic model knows."""

    leapt = 0.0

    def __init__(
        self,
        server: Server,
        monkeypatch: pytest.MonkeyPatch,
        hold: str = "1",
        full_ms: float = 60.0,
        variant_ms: float = 30.0,
    ) -> None:
        self.server, self.repository = server, server.repository
        self.rankers = {version: self.repository.get("films", version) for version in ("1", "1-pruned")}
        self.items = self.rankers["1"].catalogue.ids.items[:20]
        self._gate, begun = threading.Event(), threading.Event()
        self._pool, self._sent = ThreadPoolExecutor(32), list[Future[Any]]()
        monkeypatch.setattr(elastic_of(self.repository), "_clock", lambda: time.perf_counter() + Crowd.leapt)
        self.later(1000.0)
        assert current(self.repository) == "1"
        self.later(1000.0)  # it may have come back just now, and then stays for a second
        histories_take(self.rankers["1"], full_ms)
        histories_take(self.rankers["1-pruned"], variant_ms)
        path = self.rankers[hold].path
        prepare, holder = path.prepare, f"holds the core at {Crowd.leapt}"  # one whose state nobody has

        def holding(item: Any, executor: Any, alone: bool, wide: bool) -> Any:
            if item.request.user_id == holder:
                begun.set()
                self._gate.wait(PATIENCE_S)
            return prepare(item, executor, alone, wide)

        monkeypatch.setattr(path, "prepare", holding)
        self.first = self.send(self.v1(holder, version=hold))
        assert begun.wait(PATIENCE_S)

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()
        self._pool.shutdown()

    def later(self, seconds: float) -> None:
        Crowd.leapt += seconds

    def let_go(self) -> None:
        self._gate.set()

    def send(self, ask: Callable[[], Any]) -> Future[Any]:
        """Ask, and wait until it has its place."""
        before = self._unfinished()
        future = self._pool.submit(ask)
        eventually(lambda: self._unfinished() > before or future.done(), "it has its place")
        return future

    def _unfinished(self) -> int:
        return sum(ranker.schedule.unfinished for ranker in self.rankers.values())

    def v1(self, user: str, **more: Any) -> Callable[[], httpx.Response]:
        body = {"user_id": user, "candidates": self.items, "model": "films", **more}
        return lambda: httpx.post(f"{self.server.url}/v1/rank", json=body, timeout=PATIENCE_S)

    def v2(self, user: str, version: str = "") -> Callable[[], httpx.Response]:
        inputs = [
            {"name": name, "datatype": "BYTES", "shape": [len(values)], "data": list(values)}
            for name, values in (("user_id", (user,)), ("candidates", self.items))
        ]
        path = f"/v2/models/films{f'/versions/{version}' if version else ''}/infer"
        return lambda: httpx.post(self.server.url + path, json={"inputs": inputs}, timeout=PATIENCE_S)

    def rpc(self, service: str, name: str, **fields: Any) -> Callable[[], Any]:
        asked, given, _ = messages.methods(service)[name]

        def call() -> Any:
            with grpc.insecure_channel(self.server.grpc_address) as channel:
                ask = channel.unary_unary(
                    f"/{service}/{name}",
                    request_serializer=asked.SerializeToString,
                    response_deserializer=given.FromString,
                )
                return ask(asked(**fields), timeout=PATIENCE_S)

        return call

    def grpc_rank(self, user: str, version: str = "") -> Callable[[], Any]:
        return self.rpc("rankd.v1.Ranking", "Rank", model="films", version=version, user_id=user, candidates=self.items)

    def grpc_infer(self, user: str, version: str = "") -> Callable[[], Any]:
        inputs = [
            {
                "name": name,
                "datatype": "BYTES",
                "shape": [len(values)],
                "contents": {"bytes_contents": [value.encode() for value in values]},
            }
            for name, values in (("user_id", (user,)), ("candidates", self.items))
        ]
        return self.rpc(
            "inference.GRPCInferenceService",
            "ModelInfer",
            model_name="films",
            model_version=version,
            inputs=inputs,
        )


def test_too_much_load_is_answered_by_the_variant_which_every_protocol_names(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Crowd(server, monkeypatch) as crowd:
        full, variant = crowd.rankers["1"], crowd.rankers["1-pruned"]
        switched = {to: figure(server, f'rankd_elastic_switches_total{{model="films",to="{to}"}}') for to in SWITCHES}
        waits = crowd.send(crowd.v1("a1"))  # behind the one that holds the core; then more than 100 ms wait
        named_none = {
            "v1": crowd.send(crowd.v1("b1")),
            "v2": crowd.send(crowd.v2("b2")),
            "rank": crowd.send(crowd.grpc_rank("b3")),
            "infer": crowd.send(crowd.grpc_infer("b4")),
        }
        named_full = {
            "v1": crowd.send(crowd.v1("c1", version="1")),
            "v2": crowd.send(crowd.v2("c2", "1")),
            "rank": crowd.send(crowd.grpc_rank("c3", "1")),
            "infer": crowd.send(crowd.grpc_infer("c4", "1")),
        }
        assert current(server.repository) == "1-pruned"
        assert figure(server, 'rankd_elastic_current{model="films",version="1-pruned"}') == 1.0
        assert figure(server, 'rankd_elastic_current{model="films",version="1"}') == 0.0
        assert not any(one.done() for one in named_none.values())  # both versions have one core together
        crowd.let_go()
        assert waits.result().json()["version"] == crowd.first.result().json()["version"] == "1"
        for sent, version in ((named_none, "1-pruned"), (named_full, "1")):
            assert sent["v1"].result().json()["version"] == version
            assert sent["v2"].result().json()["model_version"] == version
            assert sent["rank"].result().version == version
            assert sent["infer"].result().model_version == version
        for user, ranker, answer in (("b1", variant, named_none["v1"]), ("c1", full, named_full["v1"])):
            expected = ranker.rank(RankRequest(user, crowd.items)).scores
            np.testing.assert_allclose(answer.result().json()["scores"], expected, atol=1e-5)
        differ = np.abs(full.rank(RankRequest("b1", crowd.items)).scores - named_none["v1"].result().json()["scores"])
        assert differ.max() > 1e-4  # another model
        crowd.later(100.0)
        assert crowd.v1("d1")().json()["version"] == "1"
        assert figure(server, 'rankd_elastic_current{model="films",version="1"}') == 1.0
        for to in SWITCHES:
            assert figure(server, f'rankd_elastic_switches_total{{model="films",to="{to}"}}') == switched[to] + 1


def test_answers_are_counted_by_who_gave_them(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted() -> list[int]:
        answers = server.repository.elastic.figures()["films"].answers
        return [answers.get(version, 0) for version in ("1", "1-pruned")]

    before = counted()
    with Crowd(server, monkeypatch) as crowd:
        sent = [crowd.send(crowd.v1(f"e{number}")) for number in range(4)]
        refused = crowd.v1("e9", candidates=[])().status_code
        crowd.let_go()
        assert [one.result().json()["version"] for one in sent] == ["1", "1-pruned", "1-pruned", "1-pruned"]
        assert refused == 400
    after = counted()
    assert [later - earlier for earlier, later in zip(before, after, strict=True)] == [1, 3]
    assert figure(server, 'rankd_elastic_answers_total{model="films",version="1-pruned"}') == after[1]


def test_a_user_whose_state_the_full_version_has_is_answered_by_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = server.repository.get("films").catalogue.ids
    users = ids.users[-2:]  # of whom no other test makes states
    for version, user in zip(("1", "1-pruned"), users, strict=True):
        server.repository.get("films", version).rank(RankRequest(user, ids.items[:3]))
    with Crowd(server, monkeypatch) as crowd:
        crowd.send(crowd.v1("f1"))
        sent = [crowd.send(crowd.v1(user)) for user in (*users, "f2")]
        assert current(server.repository) == "1-pruned"
        crowd.let_go()
        assert [one.result().json()["version"] for one in sent] == ["1", "1-pruned", "1-pruned"]


def test_who_is_refused_for_want_of_time_is_answered_by_the_variant_if_that_can(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = ElasticConfig(("1-pruned",), to_lighter_ms=1900.0, to_full_ms=1800.0, dwell_seconds=0.1)
    with Server(models, config_of(patient)) as server, Crowd(server, monkeypatch, "1-pruned", 6000.0, 1.0) as crowd:
        answer = crowd.send(crowd.v1("g1", timeout_ms=6500))
        assert current(server.repository) == "1-pruned"
        crowd.let_go()
        assert answer.result().json()["version"] == "1-pruned"
        refusals = server.repository.get("films").schedule.figures().counts.refused
        assert refusals == 1


def changed(models: Path, root: Path, version: str, change: Callable[[dict[str, Any]], Any], copy: str = "") -> Path:
    """A copy of the models in which a version, or a copy of it under another name, has another model.toml."""
    if not (root / "films").exists():
        shutil.copytree(models / "films", root / "films")
    place = root / "films" / (copy or version)
    if copy:
        shutil.copytree(root / "films" / version, place)
    document = tomllib.loads((place / "model.toml").read_text())
    document["version"] = copy or version
    change(document)
    write_manifest(place, tomli_w.dumps(document))
    return root


def without_record(document: dict[str, Any]) -> None:
    del document["compression"]


def that_lost_too_much(document: dict[str, Any]) -> None:
    document["compression"]["gate"]["metrics"]["gauc"] |= {"low": 0.1}


def of_another_run(document: dict[str, Any]) -> None:
    document["compression"]["original_sha256"] = "0" * 64


def that_is_cut(document: dict[str, Any]) -> None:
    document["files"]["weights.safetensors"]["size_bytes"] += 1


@pytest.mark.parametrize(
    ("change", "bounds", "words"),
    [
        (without_record, {}, "it has no gate record"),
        (that_lost_too_much, {}, r"gauc keeps .* and 0\.2 is asked for"),
        (of_another_run, {}, "judged it against another model than version '1'"),
        (lambda document: None, {"hr@10": 0.5}, r"it has judged gauc, and hr@10 is asked for"),
        (that_is_cut, {}, r"weights\.safetensors has .* it was cut"),
    ],
)
def test_a_variant_that_may_not_answer_is_left_out_and_says_why(
    models: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[dict[str, Any]], Any],
    bounds: dict[str, float],
    words: str,
) -> None:
    root = changed(models, tmp_path, "1-pruned", change)
    repository = ModelRepository(root, config_of(ElasticConfig(("1-pruned",), bounds)))
    try:
        with caplog.at_level(logging.ERROR, "rankd"):
            repository.start()
        assert repository.ready
        full = repository.get("films")
        assert full.manifest.version == "1"
        (status,) = (one for one in repository.index() if one.version == "1-pruned")
        assert status.state is ModelState.UNAVAILABLE
        (line,) = (record.getMessage() for record in caplog.records if "is not used" in record.getMessage())
        for said in (status.reason, line):
            assert re.search(words, said)
        assert repository.elastic.figures()["films"].usable == {"1": True, "1-pruned": False}
        request = RankRequest("u", full.catalogue.ids.items[:5])
        assert elastic_of(repository).choose(request, full) is full
        with pytest.raises(Unavailable):
            repository.get("films", "1-pruned")
    finally:
        repository.close()


@pytest.fixture
def repository(models: Path, tmp_path: Path) -> Iterator[ModelRepository]:
    """Of a copy, with both variants."""
    root = changed(models, tmp_path, "1", lambda document: None)
    shutil.copytree(models.with_name("int8") / "films" / "1-int8", root / "films" / "1-int8")
    made = ModelRepository(root, config_of(ElasticConfig(("1-pruned", "1-int8"), {"gauc": 0.2})))
    made.start()
    yield made
    made.close()


def test_variants_are_loaded_with_the_full_version_and_are_not_the_newest(repository: ModelRepository) -> None:
    assert [version for _, version, _ in repository.rankers()] == ["1-int8", "1-pruned", "1"]
    assert repository.get("films").manifest.version == repository.get().manifest.version == "1"
    assert repository.get("films", "1-int8").backend.precision is Precision.INT8
    figures = repository.elastic.figures()["films"]
    assert figures.current == "1"
    assert figures.usable == {"1": True, "1-pruned": True, "1-int8": True}
    item = repository.get("films").catalogue.ids.items[0]
    stored = repository.append_events("films", "somebody", (Event(item),)).stored
    assert list(stored.items()) == [("1-int8", 1), ("1-pruned", 1), ("1", 1)]  # the newest is last, and decides


def test_variants_come_and_go_and_the_full_version_serves(
    repository: ModelRepository, caplog: pytest.LogCaptureFixture
) -> None:
    elastic, full = elastic_of(repository), repository.get("films")
    requests = [RankRequest(f"u{number}", full.catalogue.ids.items[:5]) for number in range(3)]
    for version in ("1", "1-pruned", "1-int8"):
        histories_take(repository.get("films", version), {"1": 3000.0, "1-pruned": 300.0, "1-int8": 30.0}[version])
    gate = threading.Event()
    path, prepare = full.path, full.path.prepare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path, "prepare", lambda *given: (gate.wait(PATIENCE_S), prepare(*given))[1])
        held = full.submit(requests[0])  # three seconds of work
        assert elastic.choose(requests[1], full).manifest.version == "1-pruned"
        assert current(repository) == "1-pruned"
        with caplog.at_level(logging.INFO, "rankd"):
            repository.unload("films", "1-pruned")
        assert "variant 1-pruned is not used: it is not loaded" in caplog.text
        assert repository.elastic.figures()["films"].usable == {"1": True, "1-int8": True, "1-pruned": False}
        assert elastic.choose(requests[2], full).manifest.version == "1-int8"
        repository.unload("films", "1-int8")
        assert current(repository) == "1"
        assert elastic.choose(requests[2], full) is full
        gate.set()
        assert held.result(PATIENCE_S).version == "1"
    repository.load("films")
    assert repository.elastic.figures()["films"].usable == {"1": True, "1-pruned": True, "1-int8": True}


def test_without_a_full_version_variants_answer_those_alone_who_name_them(repository: ModelRepository) -> None:
    repository.unload("films", "1")
    with pytest.raises(Unavailable, match="no version that is ready"):
        repository.get("films")
    with pytest.raises(Unavailable, match="no version that is ready"):
        repository.get()
    assert repository.get("films", "1-pruned").manifest.version == "1-pruned"
    figures = repository.elastic.figures()["films"]
    assert (figures.current, figures.usable) == ("", {"1-pruned": False, "1-int8": False})
    repository.load("films")
    assert elastic_of(repository).figures().usable == {"1": True, "1-pruned": True, "1-int8": True}


def test_a_new_full_version_has_the_variants_that_were_judged_against_it(
    repository: ModelRepository, tmp_path: Path
) -> None:
    changed(tmp_path, tmp_path, "1", lambda document: None, copy="2")
    assert repository.load("films").manifest.version == "2"
    assert elastic_of(repository).figures().usable == {"2": True, "1-pruned": True, "1-int8": True}
    changed(tmp_path, tmp_path, "1", lambda document: document.update(run_sha256="another"), copy="3")
    assert repository.load("films").manifest.version == "3"
    assert elastic_of(repository).figures().usable == {"3": True, "1-pruned": False, "1-int8": False}
    repository.unload("films", "3")
    assert repository.get("films").manifest.version == "2"
    assert elastic_of(repository).figures().usable == {"2": True, "1-pruned": True, "1-int8": True}


def test_a_configuration_that_does_not_fit_is_refused_at_the_start(models: Path, tmp_path: Path) -> None:
    def start(config: ServeConfig, root: Path = models) -> None:
        ModelRepository(root, config).start()

    with pytest.raises(ConfigError, match=r"variants names '1-prund', .* 1, 1-pruned\. Did you mean '1-pruned'"):
        start(config_of(ElasticConfig(("1-prund",))))
    with pytest.raises(ConfigError, match=r"elastic\.film: no model 'film' is to be loaded.* Did you mean 'films'"):
        start(ServeConfig(elastic={"film": PRUNED}))
    with pytest.raises(ConfigError, match=r"elastic\.films: to_full_ms is 100"):
        start(config_of(ElasticConfig(("1-pruned",), to_full_ms=100.0)))
    shutil.copytree(models / "films" / "1-pruned", tmp_path / "films" / "1-pruned")
    with pytest.raises(NotFound, match="has no full version, only the variants 1-pruned"):
        start(config_of(), tmp_path)


def test_how_it_is_written_down(tmp_path: Path) -> None:
    path = tmp_path / "rankd.toml"
    page = (Path(__file__).parents[2] / "docs" / "elastic.md").read_text()
    path.write_text(page.partition("```toml\n")[2].partition("```")[0])
    assert read_config(ServeConfig, path).elastic == {
        "mine": ElasticConfig(("3-half",), {"ndcg@10": 0.99, "gauc": 0.999})
    }
    path.write_text('[elastic.films]\nvariants = ["1-pruned"]\nbounds = { "ndcg@10" = 0.99 }\nto_lighter_ms = 80\n')
    environment = {"RANKD_ELASTIC__FILMS__VARIANTS": "a,b", "RANKD_ELASTIC__FILMS__CALM_SECONDS": "9"}
    assert read_config(ServeConfig, path).elastic["films"] == ElasticConfig(
        ("1-pruned",), {"ndcg@10": 0.99}, to_lighter_ms=80.0
    )
    assert read_config(ServeConfig, path, environment).elastic["films"].variants == ("a", "b")
    assert read_config(ServeConfig, path, environment).elastic["films"].calm_seconds == 9.0
    for text, words in (
        ('variants = ["a"]\nto_light_ms = 1\n', r"unknown key 'elastic\.films\.to_light_ms'.*'to_lighter_ms'"),
        ("variants = []\n", "length >= 1"),
        ("to_full_ms = 1.0\n", "missing required field `variants`"),
        ('variants = ["a"]\nto_full_load = 1.5\n', "<= 1"),
        ('variants = ["a"]\nbounds = { gauc = 0 }\n', "> 0"),
    ):
        path.write_text(f"[elastic.films]\n{text}")
        with pytest.raises(ConfigError, match=words):
            read_config(ServeConfig, path)


def test_nothing_is_there_of_it_when_it_is_off(models: Path) -> None:
    with Server(models, ServeConfig(port=0, engine=ONE_EXECUTOR)) as server:
        assert server.repository.get("films").manifest.version == "1-pruned"  # the newest, by name
        assert server.repository.elastic.of(server.repository.get("films")) is None
        body = {"user_id": "u", "candidates": ["a"]}
        assert httpx.post(f"{server.url}/v1/rank", json=body).json()["version"] == "1-pruned"
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        assert [line for line in lines if line.startswith("rankd_elastic")] == []
