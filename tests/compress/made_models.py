"""Small models of random shapes, the requests they are tried on, and pruning by masks as the plain reference."""

from __future__ import annotations

import copy
from typing import Any, cast

import msgspec
import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from rankd.compress.surgery import Indices, Kept, KeptLayer, Subject
from rankd.features.assembly import candidate_arrays, history_arrays
from rankd.features.schema import Strategy, SubSequence
from rankd.models.layer_shapes import FusionShape, LayerShape
from rankd.models.protocol import create_model, logits_of
from rankd.train.recipe import ModelChoice
from tests.features.sample_schema import DAY, make_history, make_items, make_schema, make_user

SCHEMAS = {"climber": make_schema(), "sasrec": make_schema(SubSequence(Strategy.RECENT))}


def subject_of(kind: str, options: dict[str, Any], seed: int = 0) -> Subject:
    """A model with random weights everywhere, so that every part of it counts."""
    torch.manual_seed(seed)
    model = create_model(kind, SCHEMAS[kind], options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Subject(ModelChoice(kind, options), SCHEMAS[kind], model.eval())


def logits(subject: Subject) -> Tensor:
    """Logits (1, C, K) of a request that fills no bucket."""
    with torch.inference_mode():
        return logits_of(subject.model, *request(subject.choice.kind))


def request(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """History and candidates."""
    history, rows = make_history([5, 6, 7, 5, 9]), np.asarray([3, 4, 5, 6, 7], np.int32)
    items = make_items()
    packed = history_arrays(SCHEMAS[kind], items, history)
    candidates = candidate_arrays(SCHEMAS[kind], items, history, rows, make_user(), 100 * DAY)
    return tuple({k: torch.from_numpy(v) for k, v in one.items()} for one in (packed, candidates))  # type: ignore[return-value]


def layers(heads: st.SearchStrategy[int], ranks: st.SearchStrategy[int]) -> st.SearchStrategy[LayerShape]:
    sizes = st.integers(1, 6)
    return st.builds(LayerShape, heads, st.integers(1, 4), sizes, ranks, ranks, ranks, ranks)


STACKS = st.lists(layers(st.integers(1, 3), st.integers(0, 3)), min_size=1, max_size=3)


@st.composite
def climber_options(draw: st.DrawFn) -> dict[str, Any]:
    """Options of a Climber whose layers are all different."""
    shape = {
        "blocks": msgspec.to_builtins([draw(STACKS), draw(STACKS)]),
        "fusion": msgspec.to_builtins(FusionShape(draw(st.integers(1, 2)), draw(st.integers(1, 4)), 3)),
        "repeats": draw(st.integers(1, 2)),
    }
    return {"width": draw(st.integers(2, 8)), "hidden": 4, "shape": shape}


@st.composite
def sasrec_options(draw: st.DrawFn) -> dict[str, Any]:
    """Options of a SASRec whose layers are all different."""
    return {"width": draw(st.integers(2, 8)), "shape": msgspec.to_builtins(draw(STACKS))}


@st.composite
def some_of(draw: st.DrawFn, count: int) -> Indices:
    """At least one of 0..count - 1, ascending."""
    chosen = draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count))
    return np.asarray(sorted(chosen), np.int64)


@st.composite
def kept_parts(draw: st.DrawFn, subject: Subject) -> Kept:
    """Any part of a model that can stay."""
    anatomy = subject.anatomy()
    channels = draw(some_of(anatomy.width)) if anatomy.has_prunable_width() else np.arange(anatomy.width)
    blocks = tuple(
        tuple(
            KeptLayer(int(number), draw(some_of(stack[number].heads)), draw(some_of(stack[number].ffn)))
            for number in draw(some_of(len(stack)))
        )
        for stack in anatomy.blocks
    )
    return Kept(channels, blocks)


class _KeptNorm(nn.Module):
    """A layer norm over some channels; the others are 0 after it."""

    def __init__(self, norm: nn.LayerNorm, mask: Tensor) -> None:
        super().__init__()
        self.norm, self.mask = norm, mask

    def forward(self, x: Tensor) -> Tensor:
        count = self.mask.sum()
        mean = (x * self.mask).sum(-1, keepdim=True) / count
        variance = ((x - mean).square() * self.mask).sum(-1, keepdim=True) / count
        normed = (x - mean) / (variance + self.norm.eps).sqrt()
        masked: Tensor = (normed * self.norm.weight + self.norm.bias) * self.mask
        return masked


def masked(subject: Subject, kept: Kept) -> Subject:
    """The same model, as large as before, with what is not kept masked by zeros."""
    anatomy = subject.anatomy()
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        for block, stack in enumerate(anatomy.blocks):
            stays = {layer.number: layer for layer in kept.blocks[block]}
            for number, shape in enumerate(stack):
                layer = model.get_submodule(anatomy.layer_name(block, number).removesuffix("."))
                _mask_layer(layer, shape, stays.get(number))
        if len(kept.channels) < anatomy.width:
            _mask_channels(model, _mask(anatomy.width, kept.channels), len(anatomy.blocks))
    return Subject(subject.choice, subject.schema, model)


def _mask_layer(layer: Any, shape: LayerShape, kept: KeptLayer | None) -> None:
    if kept is None:  # nothing is added to the tokens
        for parameter in (layer.out.weight, layer.out.bias, layer.ffn[3].weight, layer.ffn[3].bias):
            parameter.zero_()
        return
    heads = _mask(shape.heads, kept.heads).repeat_interleave(shape.head_width)
    for projection, mask in ((layer.out, heads), (layer.ffn[3], _mask(shape.ffn, kept.neurons))):
        inputs = projection.weight if projection.reduce is None else projection.reduce.weight
        inputs.mul_(mask)


def _mask_channels(model: Any, mask: Tensor, num_blocks: int) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm):
            parent, _, attribute = name.rpartition(".")
            of_all = mask.repeat(num_blocks) if name == "head.0" else mask
            setattr(model.get_submodule(parent), attribute, _KeptNorm(module, of_all))
    model.fusion.gate[0].weight.mul_(mask.repeat(num_blocks))
    if model.tokens.numeric is not None:
        cast(nn.Linear, model.tokens.numeric[2]).weight.mul_(mask)


def _mask(count: int, kept: Indices) -> Tensor:
    mask = torch.zeros(count)
    mask[torch.from_numpy(kept)] = 1.0
    return mask
