"""Several targets at once for one version: what one computes the others go on with, and what does not go together."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankd import Event, Ranker, RankRequest
from rankd.build.pack import BuildOptions, build_artifact
from rankd.config import read_config
from rankd.engine import mixed_targets
from rankd.engine.backend import EngineConfig, Executor, Isolation, Precision, StateType
from rankd.engine.mixed_targets import MixedBackend, kinds_of, parts_of
from rankd.engine.targets import load_backend, why_not
from rankd.engine.thread_plan import plan
from rankd.engine.topology import Core, Topology
from rankd.engine.warming import Shapes
from rankd.errors import ArtifactError, ConfigError, EngineFailure
from rankd.models.protocol import create_model
from rankd.serve.settings import ServeConfig
from rankd.serve.v1 import describe_version
from rankd.states.state_config import StateConfig, Storage
from rankd.train.recipe import ModelChoice
from rankd.types import UserState
from tests.features.stores.redis_server import eventually
from tests.train.small_log import RECIPE, small_dataset

DATASET = small_dataset(window_step=8)
ITEMS = DATASET.log.item_ids
SIZES = {"width": 32, "heads": 2, "layers": 2, "hidden": 32}
MIX = ("openvino:1", "onnxruntime:1")
BOUND = 1e-4
"""Largest difference of a logit between libraries in float32, for weights of standard deviation 0.2."""


@pytest.fixture(scope="module", autouse=True)
def two_cpus() -> Iterator[None]:
    """However few this machine has."""
    cores = tuple(Core(0, frozenset({cpu})) for cpu in range(4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixed_targets, "read_topology", lambda: Topology(cores, frozenset(range(4))))
        yield


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Climber of random weights for both targets; OpenVINO's is served in bfloat16 where the processor has it."""
    torch.manual_seed(1)
    model = create_model("climber", DATASET.schema, SIZES).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    recipe = msgspec.structs.replace(RECIPE, model=ModelChoice("climber", SIZES))
    options = BuildOptions("films", "1", targets=("openvino", "onnxruntime"))
    return build_artifact(tmp_path_factory.mktemp("models"), model, DATASET, recipe, options)


def opened(artifact: Path, **engine: Any) -> Ranker:
    return Ranker.load(artifact, EngineConfig(precision=Precision.FP32, **engine))


@pytest.fixture(scope="module")
def mixed(artifact: Path) -> Iterator[Ranker]:
    with opened(artifact, mix=MIX) as ranker:
        yield ranker


@pytest.fixture(scope="module")
def plain(artifact: Path) -> Iterator[Ranker]:
    with opened(artifact, target="openvino", executors=1) as ranker:
        yield ranker


@pytest.fixture(scope="module")
def executors(mixed: Ranker) -> list[Executor]:
    """One more of each kind: the ranker's own are its schedule's."""
    return [kind.executor() for kind in kinds_of(mixed.backend)]


def history(events: int) -> tuple[Event, ...]:
    start = DATASET.schema.log_end - 10_000
    kinds = DATASET.schema.event_types
    return tuple(Event(ITEMS[7 * n % len(ITEMS)], kinds[n % len(kinds)], start + 60 * n) for n in range(events))


def request(user: str, candidates: int, events: int = 12, first: int = 0) -> RankRequest:
    chosen = tuple(ITEMS[(first + n) % len(ITEMS)] for n in range(candidates))
    return RankRequest(user, chosen, history=history(events), time=DATASET.schema.log_end)


@settings(max_examples=20, deadline=None)
@given(
    events=st.integers(0, 30),
    rows=st.integers(2, 16),
    seed=st.integers(0, 99),
    encoder=st.integers(0, 1),
    data=st.data(),
)
def test_any_cut_across_kinds_is_the_whole_and_states_of_one_are_good_for_the_other(
    mixed: Ranker,
    executors: list[Executor],
    events: int,
    rows: int,
    seed: int,
    encoder: int,
    data: st.DataObject,
) -> None:
    shapes = Shapes(mixed.manifest, mixed.backend.state_type)
    room, bucket = shapes.rooms[-1], mixed.schema.candidate_buckets[0]
    tokens = shapes.history(room)
    draws = np.random.default_rng(seed)
    tokens["history_item"][...] = draws.integers(2, len(ITEMS), tokens["history_item"].shape)
    tokens["history_length"][...] = min(events, room)
    lengths = (min(events, room),) * mixed.schema.num_sub_sequences
    states = [
        UserState({name: array.copy() for name, array in executor.encode(tokens).items()}, lengths)
        for executor in executors
    ]
    for name, array in states[0].arrays.items():
        assert (array.dtype, array.shape) == (states[1].arrays[name].dtype, states[1].arrays[name].shape)
    rows = min(rows, bucket)
    whole = shapes.candidates(bucket, 1)
    whole["candidate_item"][0, :rows] = draws.integers(2, len(ITEMS), rows)
    expected = executors[0].score([states[0]], whole)[0, :rows]
    cut = data.draw(st.integers(1, rows))
    for scorers in ((0, 1), (1, 0)):
        found = []
        for scorer, part in zip(scorers, (slice(0, cut), slice(cut, rows)), strict=True):
            inputs = shapes.candidates(bucket, 1)
            size = part.stop - part.start
            inputs["candidate_item"][0, :size] = whole["candidate_item"][0, part]
            found.append(executors[scorer].score([states[encoder]], inputs)[0, :size])
        np.testing.assert_allclose(np.concatenate(found), expected, atol=BOUND)


def test_requests_are_answered_as_by_one_target_whoever_works_on_them(mixed: Ranker, plain: Ranker) -> None:
    most = min(mixed.schema.max_candidates, len(ITEMS))
    sizes = [1 + 37 * number % most for number in range(120)]
    asked = [request(f"user {number % 30}", size, 4 + number % 9, number) for number, size in enumerate(sizes)]
    futures = [mixed.submit(one) for one in asked]
    for one, future in zip(asked, futures, strict=True):
        np.testing.assert_allclose(future.result(60).scores, plain.rank(one).scores, atol=BOUND)
    kinds = mixed.schedule_figures().kinds
    assert [one.name for one in kinds] == ["openvino", "onnxruntime"]
    assert all(one.counts.calls for one in kinds)
    assert all(one.counts.busy_seconds > 0.0 for one in kinds)


def test_a_kind_is_measured_by_itself(mixed: Ranker) -> None:
    one, other = (rules.costs for rules in mixed.schedule.all_rules.kinds)
    assert one is not other
    assert set(one.warmed.encode_ms) == set(other.warmed.encode_ms) == set(mixed.schema.history_buckets)
    assert one.warmed.score_ms != other.warmed.score_ms


def test_a_mix_is_named(mixed: Ranker) -> None:
    assert mixed.backend.target == "openvino:1 + onnxruntime:1"
    assert describe_version(mixed).target == mixed.backend.target
    assert (mixed.backend.num_executors, mixed.backend.precision) == (2, Precision.FP32)
    assert mixed.backend.memory_bytes() == sum(kind.memory_bytes() for kind in kinds_of(mixed.backend))


@pytest.mark.parametrize("kind", [0, 1])
def test_an_executor_that_fails_is_replaced_by_one_of_its_kind(
    artifact: Path, plain: Ranker, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(artifact, mix=MIX) as ranker:
        failing, number = ranker.schedule.executors[kind], count()

        def fail(*_: object) -> None:
            raise EngineFailure("this one is broken")

        monkeypatch.setattr(failing, "score", fail)
        while ranker.schedule_figures().counts.lost_executors == 0:
            futures = [ranker.submit(request(f"user {next(number)}", 40)) for _ in range(8)]
            for future in futures:
                assert future.result(60).scores.shape[0] == 40
            assert next(number) < 2000
        eventually(lambda: ranker.schedule.executors[kind] is not failing, "it is replaced")
        now = ranker.schedule.executors
        assert type(now[kind]) is type(failing)
        assert type(now[1 - kind]) is not type(failing)
        one = request("who comes then", 30)
        np.testing.assert_allclose(ranker.rank(one).scores, plain.rank(one).scores, atol=BOUND)


def test_a_mix_is_read_from_a_file_variables_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "rankd.toml"
    path.write_text('[engine]\nprecision = "fp32"\nmix = ["openvino:1", "onnxruntime:2x3"]\n')
    parts = parts_of(read_config(ServeConfig, path).engine)
    assert [(one.target, one.executors, one.threads) for one in parts] == [("openvino", 1, 1), ("onnxruntime", 2, 3)]
    assert {one.precision for one in parts} == {Precision.FP32}
    read = read_config(ServeConfig, path, {"RANKD_ENGINE__MIX": "openvino:2,native:1", "RANKD_ENGINE__THREADS": "2"})
    assert [(one.target, one.executors, one.threads) for one in parts_of(read.engine)] == [
        ("openvino", 2, 2),
        ("native", 1, 2),
    ]
    read = read_config(ServeConfig, path, flags={"engine.mix": ["cuda:2", "openvino:1"]})
    assert [one.target for one in parts_of(read.engine)] == ["cuda", "openvino"]


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ({"mix": ("openvino",)}, "'openvino' is not target:executors"),
        ({"mix": ("openvino:0", "onnxruntime:1")}, "'openvino:0' is not target:executors"),
        ({"mix": ("openvino:1x0", "onnxruntime:1")}, "with at least one of each"),
        ({"mix": ("openvino:2",)}, "two targets or more, each once"),
        ({"mix": ("openvino:1", "openvino:1")}, "openvino:1, openvino:1 is given"),
        ({"mix": ("openvino:1", "onyxruntime:1")}, "unknown target 'onyxruntime'.*onnxruntime"),
        ({"mix": MIX, "target": "openvino"}, "engine.target is given beside engine.mix"),
        ({"mix": MIX, "executors": 2}, "engine.executors is given beside engine.mix"),
        ({"mix": MIX, "fall_back": "openvino"}, "engine.fall_back is given beside engine.mix"),
        ({"mix": MIX, "isolation": Isolation.PROCESSES}, "engine.isolation"),
        ({"mix": ("openvino:1x3", "onnxruntime:2")}, "5 threads, and this process may use 4 cpus"),
    ],
)
def test_a_mix_that_makes_no_sense_is_refused(artifact: Path, engine: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        opened(artifact, **engine)


def test_a_target_that_was_not_built_is_refused(demo_models: Path) -> None:
    with pytest.raises(ArtifactError, match="was built for openvino, not for onnxruntime"):
        opened(demo_models / "demo", mix=MIX)


def test_one_precision_for_all(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot be served by (onnxruntime|openvino) in bf16"):
        Ranker.load(artifact, EngineConfig(mix=MIX, precision=Precision.BF16))
    if why_not("openvino", Precision.BF16):
        pytest.skip("this processor has no bfloat16")
    torch.manual_seed(1)
    model = create_model("climber", DATASET.schema, SIZES).eval()
    recipe = msgspec.structs.replace(RECIPE, model=ModelChoice("climber", SIZES))
    narrow = BuildOptions("films", "1", Precision.BF16, targets=("openvino", "onnxruntime"), fall_back=True)
    place = build_artifact(tmp_path, model, DATASET, recipe, narrow)
    with pytest.raises(ConfigError, match=r'openvino would compute in bf16.*set engine.precision = "fp32"'):
        Ranker.load(place, EngineConfig(mix=MIX))


def test_states_of_different_types_are_refused(artifact: Path) -> None:
    """ONNX Runtime hands out states in float32; OpenVINO in bfloat16 where they are to be kept so."""
    states = StateConfig(storage=Storage.BF16)
    with pytest.raises(ConfigError, match="states are bf16 on openvino, fp32 on onnxruntime"):
        Ranker.load(artifact, EngineConfig(mix=MIX, precision=Precision.FP32), states=states)


def test_the_targets_of_a_mix_divide_the_cpus_between_them() -> None:
    cores = tuple(Core(cpu // 4, frozenset({cpu})) for cpu in range(8))
    machine = Topology(cores, frozenset(range(8)))
    parts = parts_of(EngineConfig(mix=("openvino:3", "onnxruntime:1x2")))
    whole = plan(machine, 4, 2)
    assert [part.plan(machine).cpus for part in parts] == [whole.cpus[:3], whole.cpus[3:]]
    assert len(set(whole.cpus)) == 4


def test_executors_of_a_mix_come_in_the_order_of_its_kinds(artifact: Path) -> None:
    from rankd.artifact import Artifact

    config = EngineConfig(mix=("onnxruntime:1", "openvino:2"), precision=Precision.FP32)
    backend = load_backend(Artifact.open(artifact), config, StateType.FP32)
    assert isinstance(backend, MixedBackend)
    made = [type(backend.executor()).__name__ for _ in range(4)]
    assert made == ["OnnxRuntimeExecutor", "OpenVinoExecutor", "OpenVinoExecutor", "OnnxRuntimeExecutor"]
    assert backend.plan.num_executors == 3
    backend.close()
