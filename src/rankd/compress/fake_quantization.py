"""Fake int8: a torch model whose products round as those of its quantized graphs will, and let gradients through.

In: a model, its float32 graphs, an `Int8Plan`. Out: `FakeQuantized`, which `int8_tuning.py` trains: weights and
activations are float32 numbers that int8 can have, on the scales of `build/int8_graphs.py`. The gradient of rounding is
taken for 1 (straight-through, Bengio et al. 2013; Jacob et al. 2018), and for 0 where an activation is cut off.

A product of a graph is a call of `linear` in the model. Which one is told by its weight, once; from then on by the
number of the call, which no training changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from rankd.build.int8_graphs import (
    ACTIVATION_LEVELS,
    WEIGHT_LEVELS,
    Int8Plan,
    Product,
    graph_files,
    products_of,
    read_graph,
)
from rankd.errors import BuildError
from rankd.models.protocol import RankingModel, Tensors
from rankd.types import Array, Features, Float32Array

CallLimits = Mapping[str, Mapping[int, float]]
"""{graph: {number of the call of `linear` in it: limit of the activation}}"""
SAME = 1e-4
"""Of a weight's largest: graphs fold scales into weights, and differ from torch in the last bits of them."""


def narrowed_activation(x: Tensor, limit: float) -> Tensor:
    """x in 256 steps of limit / 127, one scale for the whole tensor."""
    return torch.fake_quantize_per_tensor_affine(
        x, limit / ACTIVATION_LEVELS, 0, -ACTIVATION_LEVELS - 1, ACTIVATION_LEVELS
    )


def narrowed_weight(weight: Tensor) -> Tensor:
    """A weight (outputs, inputs) in 127 steps, a scale for each output; see `int8_graphs.weight_integers`."""
    largest = weight.detach().abs().amax(1)
    scales = torch.where(largest > 0, largest, 1.0) / WEIGHT_LEVELS
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -WEIGHT_LEVELS, WEIGHT_LEVELS)


class FakeQuantized(nn.Module):
    """A ranker that computes in fake int8, in training as in evaluation. `model` is the ranker in floats."""

    def __init__(self, model: nn.Module, limits: CallLimits) -> None:
        super().__init__()
        self.model, self.limits = model, limits

    def encode(self, history: Tensors) -> dict[str, Tensor]:
        """See `RankingModel.encode`."""
        with _FakeInt8(self.limits.get("encode", {})):
            return cast(RankingModel, self.model).encode(history)

    def score(self, state: Tensors, candidates: Tensors) -> Tensor:
        """See `RankingModel.score`."""
        with _FakeInt8(self.limits.get("score", {})):
            return cast(RankingModel, self.model).score(state, candidates)


def call_limits(model: nn.Module, folder: Path, plan: Int8Plan, request: Features) -> dict[str, dict[int, float]]:
    """Which calls of a model's `linear` are the products that a plan quantizes in its graphs, with their limits.

    Raises:
        BuildError: a product is no such call.
    """
    ranker = cast(RankingModel, model.eval())
    with torch.no_grad():
        with _Weights() as encoding:
            state = ranker.encode(_tensors(request.history))
        with _Weights() as scoring:
            ranker.score(state, _tensors(request.candidates))
    weights = {"encode": encoding.weights, "score": scoring.weights}
    files, found = graph_files(folder), {}
    for graph, limits in plan.limits.items():
        products = [one for one in products_of(read_graph(files[graph])) if one.key in limits]
        found[graph] = {_call(one, weights[graph]): limits[one.key] for one in products}
    return found


class _FakeInt8(TorchFunctionMode):
    """While it lasts, calls of `linear` that have a limit read what int8 can have of activation and weight."""

    def __init__(self, limits: Mapping[int, float]) -> None:
        super().__init__()
        self._limits, self._number = limits, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear:
            limit = self._limits.get(self._number)
            self._number += 1
            if limit is not None:
                x, weight, *rest = args
                args = (narrowed_activation(x, limit), narrowed_weight(weight), *rest)
        return func(*args, **(kwargs or {}))


class _Weights(TorchFunctionMode):
    """Keeps the weights with which `linear` was called, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Float32Array] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear:
            self.weights.append(args[1].detach().numpy())
        return func(*args, **(kwargs or {}))


def _call(product: Product, weights: Sequence[Float32Array]) -> int:
    """The call that a product is; of several with the same weight the one in its place."""
    bound = SAME * float(np.abs(product.weight).max())
    calls = [
        number
        for number, weight in enumerate(weights)
        if weight.shape == product.weight.shape and np.abs(weight - product.weight).max() <= bound
    ]
    place = int(product.key.rpartition(".")[2])
    if place >= len(calls):
        raise BuildError(
            f"product {product.name} of the graphs is no linear layer of the model, so that it cannot be tuned in "
            "int8; leave [quantize.finetune] out"
        )
    return calls[place]


def _tensors(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: torch.tensor(array) for name, array in arrays.items()}
