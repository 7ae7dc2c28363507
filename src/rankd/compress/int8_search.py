"""Which layers can be int8, and on what scales: found on real requests, without the gate's days.

In: a folder of float32 graphs, calibration requests. Out: `Found`: an `Int8Plan`, and what it costs in accuracy there.

Scales are those with the least squared error of the activations seen. If all layers in int8 change the logits more than
`Quantize.max_error` allows, those that change them most by themselves stay in float, as few as it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rankd.build.int8_graphs import (
    ACTIVATION_LEVELS,
    GraphRun,
    Int8Plan,
    Product,
    graph_files,
    observed,
    quantize,
    read_graph,
)
from rankd.compress.compression_recipe import Quantize
from rankd.errors import BuildError, DataError
from rankd.train.evaluation import Progress
from rankd.train.ranking_metrics import Float64Array
from rankd.types import Array, Features, Float32Array

SEEN = 2048
"""Activations of a layer that are kept of a request, beside the largest."""
TRIED = 48
"""Requests on which choices are compared."""
SHARES = np.linspace(0.3, 1.0, 71)
MOST_KEPT = 0.5
"""Layers that may stay in float, as a share."""
Limits = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Layer:
    """Products that read the same activation of a graph, and its largest value in int8."""

    graph: str
    products: tuple[Product, ...]
    limit: float

    @property
    def name(self) -> str:
        """How people find it."""
        return f"{self.graph}: {self.products[0].name}"


@dataclass(frozen=True, slots=True)
class Found:
    """`error` is the root of the mean squared change of a logit, over the spread of a request's logits; `kept` are the
    layers that stay in float, `layers` how many there are."""

    plan: Int8Plan
    error: float
    kept: tuple[str, ...]
    layers: int


def search_int8(
    folder: Path, requests: Sequence[Features], plan: Quantize, progress: Progress = lambda done, total, line: None
) -> Found:
    """Calibrate the graphs of a folder and choose what stays in float.

    Raises:
        DataError: activations that are no numbers, or requests whose candidates all score alike.
        BuildError: nothing to quantize, or too little is left of it within `max_error`.
    """
    layers = calibrate(folder, requests, progress)
    if not layers:
        raise BuildError("the model has no product with constant weights that is large enough for int8")
    trial = _Trial(folder, some_of(requests))
    every = range(len(layers))
    if (error := trial.error(layers)) <= plan.max_error:
        return _found(layers, every, error)
    alone = []
    for number in every:
        alone.append(trial.error([layers[number]]))
        progress(number + 1, len(layers), "one layer in int8 at a time")
    harmless = np.argsort(alone, kind="stable").tolist()  # the least harm first
    most = int(MOST_KEPT * len(layers))

    def error_without(kept: int) -> float:
        return trial.error([layers[number] for number in harmless[: len(layers) - kept]])

    kept = _least(1, most, lambda count: error_without(count) <= plan.max_error)
    if kept is None:
        raise BuildError(
            f"int8 changes the logits by {error:.3g} of their spread, and by {error_without(most):.3g} with {most} of "
            f"{len(layers)} layers in float; quantize.max_error is {plan.max_error:g}: allow more and let the gate "
            "judge, tune the model to it with [quantize.finetune], or build in bf16"
        )
    chosen = harmless[: len(layers) - kept]
    return _found(layers, chosen, trial.error([layers[number] for number in chosen]))


def int8_error(folder: Path, requests: Sequence[Features], plan: Int8Plan) -> float:
    """See `Found.error`, of a plan for the graphs of a folder.

    Raises:
        DataError: requests whose candidates all score alike.
    """
    return _Trial(folder, some_of(requests)).error_of(plan.limits)


def some_of(requests: Sequence[Features]) -> Sequence[Features]:
    """Those on which choices are compared."""
    return requests[:: max(len(requests) // TRIED, 1)]


def calibrate(folder: Path, requests: Sequence[Features], progress: Progress) -> list[Layer]:
    """The layers of `encode` and `score` with their scales; without those that only ever read zeros.

    Raises:
        DataError: an activation is no number.
    """
    runs = {name: observed(read_graph(path)) for name, path in graph_files(folder).items() if name != "extend"}
    seen: dict[tuple[str, str], list[Float32Array]] = {}
    for number, features in enumerate(requests, start=1):
        arrays = {**features.history, **features.candidates}
        for name, (run, layers) in sorted(runs.items()):  # encode comes before score
            outputs = run(arrays)
            for layer in layers:
                seen.setdefault((name, layer), []).append(_some(outputs[layer]))
            arrays |= outputs
        progress(number, len(requests), "calibrating")
    found = []
    for (name, layer), values in seen.items():
        products = runs[name][1][layer]
        magnitudes = np.concatenate(values)
        if not np.isfinite(magnitudes).all():
            raise DataError(
                f"the calibration requests make {products[0].name} of {name} read values that are no numbers; "
                "calibrate on other requests"
            )
        if magnitudes.max() > 0:
            found.append(Layer(name, products, best_limit(magnitudes)))
    return found


def best_limit(magnitudes: Float32Array) -> float:
    """The limit, at most the largest of |x|, for which rounding and cutting off make the least squared error."""
    peak = float(magnitudes.max())
    counts, edges = np.histogram(magnitudes, bins=4096, range=(0.0, peak))
    middles = (edges[:-1] + edges[1:]) / 2
    limits = peak * SHARES
    beyond = np.maximum(middles[None] - limits[:, None], 0.0)
    within = (middles[None] <= limits[:, None]) * (limits[:, None] / ACTIVATION_LEVELS) ** 2 / 12
    errors = (counts * (beyond**2 + within)).sum(axis=1)
    return float(limits[int(errors.argmin())])


def _some(x: Array) -> Float32Array:
    """A few magnitudes of an activation, spread over all of its rows and columns, and the largest one."""
    flat = np.abs(x.reshape(-1))
    few: Float32Array = flat[:: (len(flat) // SEEN) | 1]  # odd, so that widths do not divide it
    return np.append(few, flat.max()) if len(flat) else few


def _found(layers: Sequence[Layer], chosen: Sequence[int], error: float) -> Found:
    names = tuple(layer.name for number, layer in enumerate(layers) if number not in set(chosen))
    plan = Int8Plan(_limits([layers[number] for number in chosen]))
    return Found(plan, error, names, len(layers))


def _limits(layers: Sequence[Layer]) -> dict[str, dict[str, float]]:
    limits: dict[str, dict[str, float]] = {}
    for layer in layers:
        limits.setdefault(layer.graph, {}).update({product.key: layer.limit for product in layer.products})
    return limits


def _least(low: int, high: int, passes: Callable[[int], bool]) -> int | None:
    """The smallest of low..high that passes, where all above one that passes do; None if the largest does not."""
    if high < low or not passes(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle + 1, high)
    return low


class _Trial:
    """Graphs with some layers in int8, held against the float32 ones on a few requests."""

    def __init__(self, folder: Path, requests: Sequence[Features]) -> None:
        self._files = {name: path for name, path in graph_files(folder).items() if name != "extend"}
        self._arrays = [{**features.history, **features.candidates} for features in requests]
        self._plain = {name: GraphRun(read_graph(path)) for name, path in self._files.items()}
        self._states = self._encoded(self._plain)
        self._logits = self._scored(self._plain, self._states)
        self._spread = float(np.mean(np.concatenate([_deviations(one) for one in self._logits]) ** 2))
        if not self._spread > 0:
            raise DataError("all candidates of the calibration requests have the same score; calibrate on other ones")

    def error(self, layers: Sequence[Layer]) -> float:
        """See `Found.error`, with these layers in int8."""
        return self.error_of(_limits(layers))

    def error_of(self, limits: Limits) -> float:
        """The same with limits of products."""
        runs = dict(self._plain)
        for name, some in limits.items():
            graph = read_graph(self._files[name])
            quantize(graph, some)
            runs[name] = GraphRun(graph)
        logits = self._scored(runs, self._encoded(runs) if "encode" in limits else self._states)
        changes = [(one - other).ravel() for one, other in zip(logits, self._logits, strict=True)]
        return float(np.sqrt(np.mean(np.concatenate(changes) ** 2) / self._spread))

    def _encoded(self, runs: Mapping[str, GraphRun]) -> list[dict[str, Array]]:
        return [runs["encode"](arrays) if "encode" in runs else {} for arrays in self._arrays]

    def _scored(self, runs: Mapping[str, GraphRun], states: Sequence[Mapping[str, Array]]) -> list[Float64Array]:
        return [
            runs["score"]({**arrays, **state})["logits"][0].astype(np.float64)
            for arrays, state in zip(self._arrays, states, strict=True)
        ]


def _deviations(logits: Float64Array) -> Float64Array:
    """(C, K) logits from the mean of their request, flat."""
    deviations: Float64Array = (logits - logits.mean(axis=0)).ravel()
    return deviations
