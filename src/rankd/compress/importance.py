"""What each head, neuron, layer and channel matters, judged by real requests, by the size of its weights, or by lot.

In: a model, its anatomy, batches of training requests. Out: `Importance`; next: `pruning_plan.py`.

A structure speaks through the weights that write its result. First-order Taylor: leaving it out changes the loss by
about the sum of weight x gradient over them (Michel et al. 2019, Molchanov et al. 2019); what counts is the absolute
value of a batch's sum, averaged over small batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rankd.compress.anatomy import Anatomy, input_name
from rankd.compress.compression_recipe import Criterion
from rankd.errors import DataError
from rankd.train.batches import Batch

Float64Array = npt.NDArray[np.float64]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True, slots=True)
class LayerImportance:
    """heads (H,), neurons (F,) and the layer as a whole."""

    heads: Float64Array
    neurons: Float64Array
    whole: float


@dataclass(frozen=True, slots=True)
class Importance:
    """Of every layer of every block, and of the channels (D,).

    `of_loss`: figures are changes of the loss, which add up and are worth what they cost; else they are of no unit.
    """

    blocks: tuple[tuple[LayerImportance, ...], ...]
    channels: Float64Array
    of_loss: bool


def importance_of(
    criterion: Criterion, model: nn.Module, anatomy: Anatomy, batches: Iterable[Batch], loss: Loss, seed: int
) -> Importance:
    """Importance by a criterion; only Taylor reads the batches.

    Raises:
        DataError: the requests give a gradient that is no number, or there are none.
    """
    if criterion is Criterion.TAYLOR:
        return taylor(model, anatomy, batches, loss)
    if criterion is Criterion.MAGNITUDE:
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        return _gather(anatomy, {name: weight.square() for name, weight in weights.items()}, torch.mean, of_loss=False)
    random = np.random.default_rng(seed)
    blocks = tuple(
        tuple(LayerImportance(random.random(one.heads), random.random(one.ffn), random.random()) for one in stack)
        for stack in anatomy.blocks
    )
    return Importance(blocks, random.random(anatomy.width), of_loss=False)


def taylor(model: nn.Module, anatomy: Anatomy, batches: Iterable[Batch], loss: Loss) -> Importance:
    """The mean over batches of |change of the loss| when a structure is left out, to first order."""
    model.eval()
    parts = []
    for batch in batches:
        model.zero_grad(set_to_none=True)
        loss(model, batch).backward()
        products = {
            name: parameter.detach() * parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not name.startswith("tokens.")  # large, and no structure is written there
        }
        parts.append(_gather(anatomy, products, torch.sum, of_loss=True))
    model.zero_grad(set_to_none=True)
    if not parts:
        raise DataError("there are no requests to judge importance by: the training time has no basket with a label")
    made = _mean_of_absolutes(parts)
    if not all(np.isfinite(one.whole) for stack in made.blocks for one in stack):
        raise DataError(
            "the training requests give gradients that are no numbers; look for infinite values in the log's features"
        )
    return made


def _gather(
    anatomy: Anatomy, values: Mapping[str, Tensor], combine: Callable[..., Tensor], of_loss: bool
) -> Importance:
    """Combine values, one for each weight and named as they are, over each structure's writing weights."""
    blocks = []
    for block, stack in enumerate(anatomy.blocks):
        layers = []
        for number, shape in enumerate(stack):
            name = anatomy.layer_name(block, number)
            out = values[input_name(name + "out", shape.out_rank)]
            down = values[input_name(name + "ffn.3", shape.down_rank)]
            written = [values[f"{name}{one}"].flatten() for one in ("out.weight", "out.bias", "ffn.3.weight")]
            layers.append(
                LayerImportance(
                    heads=_array(combine(out.unflatten(1, (shape.heads, -1)), dim=(0, 2))),
                    neurons=_array(combine(down, dim=0)),
                    whole=float(combine(torch.cat([*written, values[f"{name}ffn.3.bias"]]))),
                )
            )
        blocks.append(tuple(layers))
    channels = torch.cat([values[name].reshape(anatomy.width, -1) for name in _writers(anatomy, values)], dim=1)
    return Importance(tuple(blocks), _array(combine(channels, dim=1)), of_loss)


def _writers(anatomy: Anatomy, values: Mapping[str, Tensor]) -> list[str]:
    """Tensors whose first axis are the channels that tokens are written to."""
    names = [f"{one}.{kind}" for one in ("history_norm", "candidate_norm", "fusion.out") for kind in ("weight", "bias")]
    of_layers = [
        f"{layer}{one}.{kind}"
        for layer, _ in anatomy.layers()
        for one in ("out", "ffn.3")
        for kind in ("weight", "bias")
    ]
    return [name for name in names + of_layers if name in values]


def _mean_of_absolutes(parts: list[Importance]) -> Importance:
    def mean(values: list[Float64Array]) -> Float64Array:
        made: Float64Array = np.abs(np.stack(values)).mean(axis=0)
        return made

    blocks = tuple(
        tuple(
            LayerImportance(
                mean([one.heads for one in same]),
                mean([one.neurons for one in same]),
                float(np.abs([one.whole for one in same]).mean()),
            )
            for same in zip(*stacks, strict=True)
        )
        for stacks in zip(*(part.blocks for part in parts), strict=True)
    )
    return Importance(blocks, mean([part.channels for part in parts]), of_loss=True)


def _array(tensor: Tensor) -> Float64Array:
    return tensor.double().numpy()
