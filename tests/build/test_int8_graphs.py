"""Products of integers: what OpenVINO computes is what the plain formula says, also where 16 bits would overflow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openvino import opset13 as ops

from rankd.build.int8_graphs import (
    GraphRun,
    Int8Plan,
    layers_of,
    observed,
    products_of,
    quantize,
    read_graph,
    weight_integers,
    write_int8,
)
from rankd.errors import BuildError
from rankd.types import Float32Array

RANDOM = np.random.default_rng(0)


def graph_of(first: Float32Array, second: Float32Array | None = None) -> Any:
    """x (?, inputs) times one weight, or two, which read the same."""
    x = ops.parameter([-1, first.shape[1]], np.float32, name="x")
    weights = [first] if second is None else [first, second]
    made = [ops.matmul(x, ops.constant(weight), False, True) for weight in weights]
    results = [ops.result(one) for one in made]
    for number, result in enumerate(results):
        result.set_friendly_name(f"out_y{number}")
    return ov.Model(results, [x], "products")


def by_hand(x: Float32Array, weight: Float32Array, limit: float) -> Float32Array:
    """The same product, in float64 and by the formulas of the module's docstring."""
    step = limit / 127
    narrow = np.clip(np.rint(x.astype(np.float64) / step), -128, 127) * step
    integers, scales = weight_integers(weight)
    made: Float32Array = (narrow @ (integers * scales.astype(np.float64)).T).astype(np.float32)
    return made


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), outputs=st.integers(1, 40), inputs=st.integers(1, 40), zeros=st.booleans())
def test_weights_are_the_nearest_of_127_levels(seed: int, outputs: int, inputs: int, zeros: bool) -> None:
    weight = np.random.default_rng(seed).normal(size=(outputs, inputs)).astype(np.float32)
    weight[0] *= 0 if zeros else 1e-6
    integers, scales = weight_integers(weight)
    assert integers.dtype == np.int8
    assert np.abs(integers).max() <= 63
    assert (np.abs(weight - integers * scales) <= scales * 0.501).all()


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000), rows=st.integers(1, 20), outputs=st.integers(16, 80), inputs=st.integers(16, 300),
    limit=st.floats(0.5, 8.0),
)  # fmt: skip
def test_products_are_those_of_the_formula(seed: int, rows: int, outputs: int, inputs: int, limit: float) -> None:
    random = np.random.default_rng(seed)
    weight = random.normal(size=(outputs, inputs)).astype(np.float32)
    x = random.normal(size=(rows, inputs)).astype(np.float32)
    graph = graph_of(weight)
    quantize(graph, {products_of(graph)[0].key: limit})
    np.testing.assert_allclose(GraphRun(graph)({"x": x})["y0"], by_hand(x, weight, limit), rtol=1e-3, atol=1e-2)


def test_the_largest_products_do_not_overflow() -> None:
    """Every activation at its limit and every weight at its largest: a sum of two products of 8 bits has 17."""
    weight, x = np.full((32, 256), 0.5, np.float32), np.full((4, 256), 3.0, np.float32)
    weight[::2] *= -1
    graph = graph_of(weight)
    quantize(graph, {products_of(graph)[0].key: 3.0})
    made = GraphRun(graph)({"x": x})["y0"]
    np.testing.assert_allclose(made, x @ weight.T, rtol=1e-3)


def test_products_are_computed_in_integers() -> None:
    graph = graph_of(RANDOM.normal(size=(64, 64)).astype(np.float32))
    quantize(graph, {products_of(graph)[0].key: 3.0})
    compiled = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        about = node.get_rt_info()
        kinds[about["layerType"].astype(str)] = about["runtimePrecision"].astype(str)
    assert kinds["FullyConnected"] in ("i8", "u8", "I8", "U8")


def test_what_reads_the_same_is_one_layer_and_small_products_are_none() -> None:
    first, second = (RANDOM.normal(size=(32, 48)).astype(np.float32) for _ in range(2))
    graph = graph_of(first, second)
    assert [len(layer) for layer in layers_of(products_of(graph))] == [2]
    run, layers = observed(graph_of(first, second))
    x = RANDOM.normal(size=(3, 48)).astype(np.float32)
    assert list(layers) == ["read_0"]
    np.testing.assert_array_equal(run({"x": x})["read_0"], x)
    assert products_of(graph_of(np.ones((2, 64), np.float32))) == []


def test_equal_weights_are_told_apart_by_their_order() -> None:
    weight = RANDOM.normal(size=(32, 32)).astype(np.float32)
    keys = [product.key for product in products_of(graph_of(weight, weight.copy()))]
    assert [key[-2:] for key in keys] == [".0", ".1"]
    assert len({key[:-2] for key in keys}) == 1


def write(folder: Path, graphs: Mapping[str, Any]) -> None:
    for name, graph in graphs.items():
        ov.save_model(graph, folder / f"{name}.xml", compress_to_fp16=False)


def test_extend_has_the_scales_of_encode(tmp_path: Path) -> None:
    first, second = (RANDOM.normal(size=(32, 32)).astype(np.float32) for _ in range(2))
    write(tmp_path, {"encode": graph_of(first, second), "extend": graph_of(first)})
    keys = [product.key for product in products_of(graph_of(first, second))]
    write_int8(tmp_path, Int8Plan({"encode": dict.fromkeys(keys, 2.0)}))
    x = RANDOM.normal(size=(5, 32)).astype(np.float32)
    whole, added = (GraphRun(read_graph(tmp_path / f"{name}.xml"))({"x": x}) for name in ("encode", "extend"))
    np.testing.assert_array_equal(whole["y0"], added["y0"])
    np.testing.assert_allclose(added["y0"], by_hand(x, first, 2.0), rtol=1e-3, atol=1e-2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encode.bin", "encode.xml", "extend.bin", "extend.xml"]


def test_scales_of_other_weights_are_refused(tmp_path: Path) -> None:
    weight = RANDOM.normal(size=(32, 32)).astype(np.float32)
    write(tmp_path, {"score": graph_of(weight)})
    other = products_of(graph_of(weight + 1e-3))[0].key
    with pytest.raises(BuildError, match="1 of 1 ranges are of other weights"):
        write_int8(tmp_path, Int8Plan({"score": {other: 1.0}}))
    with pytest.raises(BuildError, match="ranges for encode, and the model has score"):
        write_int8(tmp_path, Int8Plan({"encode": {other: 1.0}}))


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_a_range_that_is_none_is_refused(limit: float) -> None:
    graph = graph_of(RANDOM.normal(size=(32, 32)).astype(np.float32))
    with pytest.raises(BuildError, match="ends at a positive number"):
        quantize(graph, {products_of(graph)[0].key: limit})
