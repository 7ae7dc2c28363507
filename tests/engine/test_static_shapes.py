"""Graphs for static shapes give the scores of the graph for any shape, and take no more memory than allowed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rankd.artifact import Artifact
from rankd.build.pack import BuildOptions, build_artifact
from rankd.engine.backend import EngineConfig, Precision, StateType
from rankd.engine.openvino_backend import OpenVinoBackend, OpenVinoExecutor
from rankd.engine.openvino_graphs import CompileOptions, ShapedGraph, load_graphs, packed_bytes, static_inputs
from rankd.engine.state_arrays import APPEND_BUCKETS
from rankd.engine.warming import Shapes
from rankd.models.protocol import create_model
from rankd.types import Array
from tests.train.small_log import RECIPE, small_dataset

DATASET = small_dataset(window_step=8)
PLENTY = 64 << 20


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(2)
    model = create_model("climber", DATASET.schema, {"width": 32, "heads": 2, "layers": 1, "hidden": 16}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    options = BuildOptions("films", "1", targets=("openvino",), fall_back=True)
    return Artifact.open(build_artifact(tmp_path_factory.mktemp("models"), model, DATASET, RECIPE, options))


def folder(artifact: Artifact) -> Path:
    return Path(artifact.path) / "engines" / "openvino"


def graphs(artifact: Artifact, static_bytes: int) -> dict[str, ShapedGraph]:
    options = CompileOptions(Precision.FP32, StateType.FP32, static_bytes=static_bytes)
    return load_graphs(folder(artifact), artifact.manifest, options)


def random_like(arrays: dict[str, Array], seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {
        name: (
            random.normal(size=array.shape) if array.dtype == np.float32 else random.integers(0, 3, array.shape)
        ).astype(array.dtype)
        for name, array in arrays.items()
    }


def test_every_call_of_one_user_has_a_graph_and_the_same_result(artifact: Artifact) -> None:
    shaped, schema = graphs(artifact, PLENTY), artifact.manifest.schema
    rooms, buckets = len(schema.history_buckets), len(schema.candidate_buckets)
    counts = {name: len(graph.static) for name, graph in shaped.items()}
    assert counts == {"encode": rooms, "extend": rooms * len(APPEND_BUCKETS), "score": rooms * buckets}
    static = OpenVinoExecutor(shaped, artifact.manifest, StateType.FP32)
    plain = OpenVinoExecutor(graphs(artifact, 0), artifact.manifest, StateType.FP32)
    for number, (name, zeros) in enumerate(static_inputs(artifact.manifest, StateType.FP32)):
        arrays = random_like(dict(zeros), number)
        assert shaped[name].key(arrays) in shaped[name].static
        given, expected = [dict(one._calls[name](arrays)) for one in (static, plain)]
        assert set(given) == set(expected) != set()
        for output in expected:
            np.testing.assert_allclose(given[output], expected[output], atol=1e-4)


@pytest.mark.parametrize("static", [False, True])
def test_a_history_is_encoded_on_more_threads_when_that_is_said(artifact: Artifact, static: bool) -> None:
    config = EngineConfig(executors=2, encode_threads=3, static_shapes=static)
    backend = OpenVinoBackend.load(artifact, config, Precision.FP32, StateType.FP32)
    first, second = backend.executor(), backend.executor()
    shapes = Shapes(artifact.manifest, StateType.FP32)
    called = calls_of_the_wide_graph(first)
    for number, room in enumerate(shapes.rooms):
        history = random_like(shapes.history(room), room)
        history["history_length"][...] = room
        plain = {name: array.copy() for name, array in first.encode(history).items()}
        for executor in (first, second):
            executor.encode_wide = True
            for name, array in executor.encode(history).items():
                np.testing.assert_allclose(array, plain[name], atol=1e-5)
            executor.encode_wide = False
            executor.encode(history)
        assert len(called) == 2 * (number + 1)
    first.close()  # lost, and perhaps still in that graph
    second.encode_wide = True
    for name, array in second.encode(history).items():
        np.testing.assert_array_equal(array, plain[name])
    assert len(called) == 2 * len(shapes.rooms)


def calls_of_the_wide_graph(executor: OpenVinoExecutor) -> list[Array]:
    """Where its calls are noted from now on, whoever makes them."""
    called, wide = list[Array](), executor._wide
    inner = wide.call
    assert inner is not None

    def note(history: Mapping[str, Array], into: Mapping[str, Array] | None) -> Mapping[str, Array]:
        called.append(history["history_item"])
        return inner(history, into)

    wide.call = note
    return called


@pytest.mark.parametrize("settings", [{"encode_threads": 1}, {"weight_copies_mib": 0}])
def test_there_is_no_graph_of_more_threads_where_it_is_not_wanted(artifact: Artifact, settings: dict[str, int]) -> None:
    config = EngineConfig(executors=2, **settings)  # type: ignore[arg-type]
    backend = OpenVinoBackend.load(artifact, config, Precision.FP32, StateType.FP32)
    assert backend.executor()._wide.call is None


@pytest.mark.parametrize("static_bytes", [0, PLENTY])
def test_shapes_without_a_graph_are_answered(artifact: Artifact, static_bytes: int) -> None:
    manifest, shaped = artifact.manifest, graphs(artifact, static_bytes)
    executor, shapes = OpenVinoExecutor(shaped, manifest, StateType.FP32), Shapes(manifest, StateType.FP32)
    state, bucket = shapes.state(shapes.rooms[0]), shapes.candidate_buckets[0]
    odd, users = shapes.candidates(bucket + 1, 1), shapes.candidates(bucket, 2)
    assert executor.score([state], odd).shape[:2] == (1, bucket + 1)
    assert executor.score([state, state], users).shape[:2] == (2, bucket)


def test_memory_is_kept_to_and_the_most_useful_come_first(artifact: Artifact) -> None:
    wanted = [name for name, _ in static_inputs(artifact.manifest, StateType.FP32)]
    assert not any(graph.static for graph in graphs(artifact, 0).values())
    each = packed_bytes(folder(artifact) / "encode.xml", Precision.FP32)
    some = {name: len(graph.static) for name, graph in graphs(artifact, each * wanted.count("encode")).items()}
    assert some == {"encode": wanted.count("encode"), "extend": 0, "score": 0}
