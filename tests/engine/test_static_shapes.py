"""Graphs for static shapes give the scores of the graph for any shape, and take no more memory than allowed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rankd.artifact import Artifact
from rankd.build.pack import BuildOptions, build_artifact
from rankd.engine.backend import Precision, StateType
from rankd.engine.openvino_backend import OpenVinoExecutor
from rankd.engine.openvino_graphs import CompileOptions, ShapedGraph, load_graphs, static_inputs
from rankd.engine.state_arrays import APPEND_BUCKETS
from rankd.engine.warming import Shapes
from rankd.models.protocol import create_model
from rankd.types import Array
from tests.train.small_log import RECIPE, small_dataset

DATASET = small_dataset(window_step=8)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(2)
    model = create_model("climber", DATASET.schema, {"width": 32, "heads": 2, "layers": 1, "hidden": 16}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    options = BuildOptions("films", "1", targets=("openvino",), fall_back=True)
    return Artifact.open(build_artifact(tmp_path_factory.mktemp("models"), model, DATASET, RECIPE, options))


def graphs(artifact: Artifact, static_mib: int) -> dict[str, ShapedGraph]:
    options = CompileOptions(Precision.FP32, StateType.FP32, static_bytes=static_mib << 20)
    return load_graphs(Path(artifact.path) / "engines" / "openvino", artifact.manifest, options)


def random_like(arrays: dict[str, Array], seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {
        name: (
            random.normal(size=array.shape) if array.dtype == np.float32 else random.integers(0, 3, array.shape)
        ).astype(array.dtype)
        for name, array in arrays.items()
    }


def test_every_call_of_one_user_has_a_graph_and_the_same_result(artifact: Artifact) -> None:
    shaped, schema = graphs(artifact, 64), artifact.manifest.schema
    rooms, buckets = len(schema.history_buckets), len(schema.candidate_buckets)
    counts = {name: len(graph.static) for name, graph in shaped.items()}
    assert counts == {"encode": rooms, "extend": rooms * len(APPEND_BUCKETS), "score": rooms * buckets}
    for number, (name, zeros) in enumerate(static_inputs(artifact.manifest, StateType.FP32)):
        arrays, graph = random_like(dict(zeros), number), shaped[name]
        static = graph.static[graph.key(arrays)]
        expected, given = [one.compiled(arrays) for one in (graph.any_shape, static)]
        for port, other in zip(graph.any_shape.compiled.outputs, static.compiled.outputs, strict=True):
            np.testing.assert_allclose(given[other], expected[port], atol=1e-4)


@pytest.mark.parametrize("static_mib", [0, 64])
def test_shapes_without_a_graph_are_answered(artifact: Artifact, static_mib: int) -> None:
    manifest, shaped = artifact.manifest, graphs(artifact, static_mib)
    executor, shapes = OpenVinoExecutor(shaped, manifest, StateType.FP32), Shapes(manifest, StateType.FP32)
    state, bucket = shapes.state(shapes.rooms[0]), shapes.candidate_buckets[0]
    odd, users = shapes.candidates(bucket + 1, 1), shapes.candidates(bucket, 2)
    assert executor.score([state], odd).shape[:2] == (1, bucket + 1)
    assert executor.score([state, state], users).shape[:2] == (2, bucket)


def test_memory_is_kept_to_and_the_most_useful_come_first(artifact: Artifact) -> None:
    wanted = [name for name, _ in static_inputs(artifact.manifest, StateType.FP32)]
    assert not any(graph.static for graph in graphs(artifact, 0).values())
    one_mib = {name: len(graph.static) for name, graph in graphs(artifact, 1).items()}
    assert 0 < sum(one_mib.values()) < len(wanted)
    assert one_mib["encode"] == wanted.count("encode")
