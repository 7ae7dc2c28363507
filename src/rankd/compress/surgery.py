"""Surgery: a model without some of its structures, as a smaller dense model of the same family.

In: a model and what of it is kept. Out: a new model whose logits are those of the old one with the rest masked out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rankd.compress.anatomy import Anatomy, anatomy_of, input_name
from rankd.features.schema import FeatureSchema
from rankd.models.layer_shapes import ClimberShape, LayerShape
from rankd.models.protocol import create_model
from rankd.train.recipe import ModelChoice

Indices = npt.NDArray[np.int64]

REPLACED = ("heads", "layers", "ffn_ratio")
"""Options whose place the option `shape` takes; of a Climber `heads` is written again, it is the fusion's."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model on its way: the name and options it is made by, and the module."""

    choice: ModelChoice
    schema: FeatureSchema
    model: nn.Module

    def anatomy(self) -> Anatomy:
        """Its sizes. Raises: BuildError, as `anatomy_of`."""
        return anatomy_of(self.model)


@dataclass(frozen=True, slots=True)
class KeptLayer:
    """A layer that stays, by its number in the old model, and which of its heads and neurons do, in their order."""

    number: int
    heads: Indices
    neurons: Indices


@dataclass(frozen=True, slots=True)
class Kept:
    """What stays of a model: channels, and for each block the layers."""

    channels: Indices
    blocks: tuple[tuple[KeptLayer, ...], ...]


def pruned(subject: Subject, kept: Kept) -> Subject:
    """The model without what is not kept."""
    anatomy, old = subject.anatomy(), subject.model.state_dict()
    weights = {name: tensor for name, tensor in old.items() if not name.startswith(("blocks.", "layers."))}
    if len(kept.channels) < anatomy.width:
        weights = _with_channels(weights, kept.channels, len(anatomy.blocks), anatomy.width)
    blocks = []
    for block, layers in enumerate(kept.blocks):
        shapes = []
        for place, layer in enumerate(layers):
            shape = anatomy.blocks[block][layer.number]
            made = _cut_layer(old, anatomy.layer_name(block, layer.number), shape, layer, kept.channels)
            weights |= {anatomy.layer_name(block, place) + name: tensor for name, tensor in made.items()}
            shapes.append(msgspec.structs.replace(shape, heads=len(layer.heads), ffn=len(layer.neurons)))
        blocks.append(tuple(shapes))
    return reshaped(subject, anatomy.with_layers(tuple(blocks)), weights, len(kept.channels))


def reshaped(subject: Subject, anatomy: Anatomy, weights: Mapping[str, Tensor], width: int) -> Subject:
    """The same kind of model in another shape, with these weights. `width` counts, not that of the anatomy."""
    options = {name: value for name, value in subject.choice.options.items() if name not in REPLACED}
    options["width"] = width
    if anatomy.fusion is None:
        options["shape"] = [_sizes(layer) for layer in anatomy.blocks[0]]
    else:
        options["heads"] = anatomy.fusion.heads
        shape = ClimberShape(anatomy.blocks, anatomy.fusion, anatomy.repeats)
        options["shape"] = {
            "blocks": [[_sizes(layer) for layer in stack] for stack in shape.blocks],
            "fusion": msgspec.to_builtins(shape.fusion),
            "repeats": shape.repeats,
        }
    choice = ModelChoice(subject.choice.kind, options)
    model = create_model(choice.kind, subject.schema, choice.options)
    model.load_state_dict({name: tensor.clone() for name, tensor in weights.items()})
    return Subject(choice, subject.schema, model.eval())


def _sizes(layer: LayerShape) -> dict[str, Any]:
    sizes: dict[str, Any] = msgspec.to_builtins(layer)
    return sizes


def _cut_layer(
    old: Mapping[str, Tensor], name: str, shape: LayerShape, kept: KeptLayer, channels: Indices
) -> dict[str, Tensor]:
    """A layer's tensors by their names within it. Queries, keys and values of a head leave together."""
    one_head = (kept.heads[:, None] * shape.head_width + np.arange(shape.head_width)).ravel()
    three = np.concatenate([one_head + part * shape.attention_width for part in range(3)])
    cuts: dict[str, dict[int, Indices]] = {
        "norm.weight": {0: channels}, "norm.bias": {0: channels},
        "qkv.weight": {0: three}, "qkv.bias": {0: three},
        "out.weight": {0: channels}, "out.bias": {0: channels},
        "bias.position": {1: kept.heads}, "bias.time": {1: kept.heads}, "log_temperature": {0: kept.heads},
        "ffn.0.weight": {0: channels}, "ffn.0.bias": {0: channels},
        "ffn.1.weight": {0: kept.neurons}, "ffn.1.bias": {0: kept.neurons},
        "ffn.3.weight": {0: channels}, "ffn.3.bias": {0: channels},
    }  # fmt: skip
    inputs = {
        input_name("qkv", shape.qkv_rank): channels,
        input_name("out", shape.out_rank): one_head,
        input_name("ffn.1", shape.up_rank): channels,
        input_name("ffn.3", shape.down_rank): kept.neurons,
    }
    for tensor, index in inputs.items():
        cuts.setdefault(tensor, {})[1] = index
    return {tensor: _cut(old[name + tensor], axes) for tensor, axes in cuts.items() if name + tensor in old}


def _with_channels(weights: Mapping[str, Tensor], kept: Indices, num_blocks: int, width: int) -> dict[str, Tensor]:
    """What a Climber has beside its layers, with some of the channels.

    The hidden neurons of the numeric features' network are as many as the channels, and leave with them.
    """
    all_blocks = (np.arange(num_blocks)[:, None] * width + kept).ravel()
    cuts: dict[str, dict[int, Indices]] = {
        "tokens.item.weight": {1: kept}, "tokens.categories.weight": {1: kept}, "tokens.event.weight": {1: kept},
        "tokens.user_categories.weight": {1: kept}, "tokens.values.weight": {0: kept},
        "tokens.user_numeric.weight": {0: kept},
        "tokens.numeric.0.weight": {0: kept}, "tokens.numeric.0.bias": {0: kept},
        "tokens.numeric.2.weight": {0: kept, 1: kept}, "tokens.numeric.2.bias": {0: kept},
        "fusion.qkv.weight": {1: kept}, "fusion.out.weight": {0: kept}, "fusion.out.bias": {0: kept},
        "fusion.gate.0.weight": {1: all_blocks},
        "fusion.gate.2.weight": {0: all_blocks}, "fusion.gate.2.bias": {0: all_blocks},
        "head.0.weight": {0: all_blocks}, "head.0.bias": {0: all_blocks}, "head.1.weight": {1: all_blocks},
    }  # fmt: skip
    for norm in ("history_norm", "candidate_norm", "fusion.norm"):
        cuts |= {f"{norm}.weight": {0: kept}, f"{norm}.bias": {0: kept}}
    return {name: _cut(tensor, cuts.get(name, {})) for name, tensor in weights.items()}


def _cut(tensor: Tensor, axes: Mapping[int, Indices]) -> Tensor:
    for axis, index in axes.items():
        tensor = tensor.index_select(axis, torch.from_numpy(index))
    return tensor
