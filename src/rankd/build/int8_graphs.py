"""Graphs in int8: products with constant weights multiply integers; everything else stays as it was.

In: graphs that `export.py` wrote for OpenVINO, and an `Int8Plan`, which `rankd compress` found on real requests. Out:
the same graphs, whose products read activations of 8 bits on a scale of their own and weights with a scale for each
output.

    activation  x ~ s q, q in -128..127, s = limit / 127: one scale for a tensor, so that a row of it is computed alike
                whatever is beside it: users in one call, parts of a list, and a state that is extended
    weight      w ~ s q, q in -63..63, s = max |w| of an output / 63

Weights have 7 bits, so that the result is the same on processors without int8 dot products: those add two products of
8 bits in 16 bits, which overflow (127 * 127 * 2 does not fit, 128 * 63 * 2 does).

What reads the same activation is one layer here: queries, keys and values are quantized together or not at all.
`extend` has the limits of `encode`, so that an extended state is what encoding the longer history gives.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rankd.engine.openvino_graphs import output_name
from rankd.engine.signal_stack import kept_signal_stack
from rankd.errors import BuildError, EngineFailure
from rankd.types import Array, Float32Array

WEIGHT_LEVELS, ACTIVATION_LEVELS = 63, 127
SMALLEST = 16
"""Products with fewer inputs or outputs stay as they are: they take no time."""
TAKES_LIMITS_OF = {"extend": "encode"}


class Int8Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """{graph: {product: limit}}: the largest |activation| that the inputs of a product can have. Products without a
    limit are not quantized. Products are known by their weights (`Product.key`), not by their place."""

    limits: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Product:
    """A product of activations with a constant weight (outputs, inputs). `key` is a checksum of the weight and, behind
    a dot, how many products with the same one come before it in the graph."""

    key: str
    name: str
    node: Any
    weight: Float32Array

    @property
    def source(self) -> tuple[str, int]:
        """What it reads: the node and the number of its output."""
        port = self.node.input_value(0)
        return port.get_node().get_friendly_name(), port.get_index()

    @property
    def work(self) -> int:
        """Multiplications for a row."""
        return self.weight.size


def read_graph(path: Path) -> Any:
    """A graph with what is constant computed, so that weights are plain constants."""
    import openvino as ov
    from openvino.passes import ConstantFolding, Manager

    graph = ov.Core().read_model(path)
    passes = Manager()
    passes.register_pass(ConstantFolding())
    passes.run_passes(graph)
    return graph


def graph_files(folder: Path) -> dict[str, Path]:
    """The graphs of a folder by their names."""
    return {path.stem: path for path in sorted(folder.glob("*.xml"))}


def products_of(graph: Any) -> list[Product]:
    """The products that can be quantized, in the order in which they are computed."""
    found, seen = [], Counter[str]()
    for node in graph.get_ordered_ops():
        constant = node.input_value(1).get_node() if node.get_type_name() == "MatMul" else None
        if constant is None or constant.get_type_name() != "Constant":
            continue
        attributes = node.get_attributes()
        if attributes["transpose_a"] or not attributes["transpose_b"]:
            continue
        weight = np.asarray(constant.data)
        if weight.ndim != 2 or min(weight.shape) < SMALLEST or weight.dtype != np.float32:
            continue
        digest = hashlib.sha256(weight.tobytes()).hexdigest()[:16]
        found.append(Product(f"{digest}.{seen[digest]}", _name(node), node, weight))
        seen[digest] += 1
    return found


def layers_of(products: Sequence[Product]) -> list[tuple[Product, ...]]:
    """Products by what they read."""
    layers: dict[tuple[str, int], list[Product]] = {}
    for product in products:
        layers.setdefault(product.source, []).append(product)
    return [tuple(layer) for layer in layers.values()]


def quantize(graph: Any, limits: Mapping[str, float]) -> None:
    """Quantize the products that have a limit, in place.

    Raises:
        BuildError: a limit is for none of the graph's products, or is no positive number.
    """
    from openvino import opset13 as ops

    products = products_of(graph)
    check_limits(limits)
    if left := set(limits) - {product.key for product in products}:
        raise BuildError(
            f"{len(left)} of {len(limits)} ranges are of other weights than those of the model; compress it again"
        )
    for layer in layers_of([product for product in products if product.key in limits]):
        step = np.float32(limits[layer[0].key] / ACTIVATION_LEVELS)
        low, high = ops.constant(-128 * step), ops.constant(ACTIVATION_LEVELS * step)
        narrow = ops.fake_quantize(layer[0].node.input_value(0), low, high, low, high, 256)
        for product in layer:
            integers, scales = weight_integers(product.weight)
            exact = ops.multiply(ops.convert(ops.constant(integers), "f32"), ops.constant(scales))
            product.node.input(0).replace_source_output(narrow.output(0))
            product.node.input(1).replace_source_output(exact.output(0))
    graph.validate_nodes_and_infer_types()


def check_limits(limits: Mapping[str, float]) -> None:
    """Raises BuildError: a limit is no positive number."""
    for key, limit in limits.items():
        if not (np.isfinite(limit) and limit > 0):
            raise BuildError(f"the range of product {key} ends at {limit}; a range ends at a positive number")


def weight_integers(weight: Float32Array) -> tuple[Array, Float32Array]:
    """(outputs, inputs) int8 and (outputs, 1) float32, whose product is nearest to the weight."""
    largest = np.abs(weight).max(axis=1, keepdims=True)
    scales: Float32Array = (np.where(largest > 0, largest, 1.0) / WEIGHT_LEVELS).astype(np.float32)
    return np.rint(weight / scales).clip(-WEIGHT_LEVELS, WEIGHT_LEVELS).astype(np.int8), scales


def write_int8(folder: Path, plan: Int8Plan) -> None:
    """Put the graphs of a folder into int8, in place.

    Raises:
        BuildError: the plan is of other weights, or has ranges for a graph that is not there.
    """
    import openvino as ov

    files = graph_files(folder)
    if missing := set(plan.limits) - set(files):
        raise BuildError(f"there are ranges for {', '.join(sorted(missing))}, and the model has {', '.join(files)}")
    for name, path in files.items():
        graph = read_graph(path)
        limits = plan.limits.get(TAKES_LIMITS_OF.get(name, name), {})
        if name in TAKES_LIMITS_OF:
            limits = {product.key: limits[product.key] for product in products_of(graph) if product.key in limits}
        quantize(graph, limits)
        beside = path.with_name(f"{name}.part.xml")  # the constants of the graph are still mapped from its file
        ov.save_model(graph, beside, compress_to_fp16=False)
        for suffix in (".bin", ".xml"):
            beside.with_suffix(suffix).replace(path.with_suffix(suffix))


def product_places(folder: Path, plan: Int8Plan) -> dict[str, dict[int, float]]:
    """{graph: {number of the product: limit}} of a plan: what it says of the same model with other weights."""
    files = graph_files(folder)
    return {
        graph: {
            number: limits[product.key]
            for number, product in enumerate(products_of(read_graph(files[graph])))
            if product.key in limits
        }
        for graph, limits in plan.limits.items()
    }


def plan_at(folder: Path, places: Mapping[str, Mapping[int, float]]) -> Int8Plan:
    """The plan of `product_places` for the graphs of a folder."""
    files, limits = graph_files(folder), {}
    for graph, some in places.items():
        products = products_of(read_graph(files[graph]))
        limits[graph] = {products[number].key: limit for number, limit in some.items()}
    return Int8Plan(limits)


class GraphRun:
    """A graph of this process, compiled for float32 and any shape, on one thread, which returns copies."""

    def __init__(self, graph: Any) -> None:
        import openvino as ov

        settings = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": "1"}
        with kept_signal_stack():
            self._compiled = ov.Core().compile_model(graph, "CPU", settings)
        self._request = self._compiled.create_infer_request()
        self._inputs = [port.get_node().get_friendly_name() for port in self._compiled.inputs]
        self._outputs = [output_name(port) for port in self._compiled.outputs]

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by their names.

        Raises:
            EngineFailure: OpenVINO failed.
        """
        try:
            self._request.infer({index: arrays[name] for index, name in enumerate(self._inputs)})
        except RuntimeError as error:
            raise EngineFailure(f"OpenVINO failed while calibrating: {error}") from error
        return {name: np.array(self._request.get_output_tensor(index).data) for index, name in enumerate(self._outputs)}


def observed(graph: Any) -> tuple[GraphRun, dict[str, tuple[Product, ...]]]:
    """The graph with what its layers read as further outputs, and the layers by the names of those outputs."""
    layers = {f"read_{number}": layer for number, layer in enumerate(layers_of(products_of(graph)))}
    for name, layer in layers.items():
        graph.add_outputs([layer[0].node.input_value(0)])[0].get_node().set_friendly_name(f"out_{name}")
    return GraphRun(graph), layers


def _name(node: Any) -> str:
    """Which module of the model a product is of; of a function's the module before it."""
    own, before = node.get_friendly_name(), node.input_value(0).get_node().get_friendly_name()
    for name, relation in ((own, ""), (before, "after ")):
        if name.startswith("__module.model."):
            return f"{relation}{name.removeprefix('__module.model.').split('/')[0]}"
    return f"{own}"
