"""One step of a recipe, done: a model goes in, a smaller one comes out.

Pruning asks `importance.py` and `pruning_plan.py`; the other steps are here. Next: fine-tuning in `compress_run.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import msgspec
import torch
from torch import Tensor

from rankd.compress.anatomy import MATRIX_NAMES
from rankd.compress.compression_recipe import Factorise, Matrix, Prune, ShareLayers, Student
from rankd.compress.importance import Loss, importance_of
from rankd.compress.pruning_plan import Price, plan_pruning
from rankd.compress.surgery import REPLACED, Subject, pruned, reshaped
from rankd.errors import BuildError, ConfigError
from rankd.models.protocol import create_model
from rankd.train.batches import Batch
from rankd.train.recipe import ModelChoice


def prune(
    subject: Subject, step: Prune, price: Price, budget: float, batches: Callable[[], Iterable[Batch]], loss: Loss
) -> Subject:
    """Leave out what matters least until the price is at most `budget`; Raises: as `plan_pruning`, `importance_of`."""
    anatomy = subject.anatomy()
    importance = importance_of(step.criterion, subject.model, anatomy, batches(), loss, step.seed)
    return pruned(subject, plan_pruning(anatomy, importance, step, price, budget))


def factorise(subject: Subject, step: Factorise) -> Subject:
    """The nearest product of two for each of the projections (the largest singular values of its weight).

    Raises:
        BuildError: a product of that rank would not be smaller than the projection.
    """
    anatomy, weights = subject.anatomy(), dict(subject.model.state_dict())
    shapes = []
    for stack_number, stack in enumerate(anatomy.blocks):
        changed = []
        for number, layer in enumerate(stack):
            ranks = {}
            for matrix in step.matrices:
                name = f"{anatomy.layer_name(stack_number, number)}{MATRIX_NAMES[matrix]}"
                weight = _whole(weights, name)
                rank = _rank(step, matrix, weight)
                weights[f"{name}.weight"], weights[f"{name}.reduce.weight"] = _two(weight, rank)
                ranks[f"{matrix.value}_rank"] = rank
            changed.append(msgspec.structs.replace(layer, **ranks))
        shapes.append(tuple(changed))
    return reshaped(subject, anatomy.with_layers(tuple(shapes)), weights, anatomy.width)


def share_layers(subject: Subject, step: ShareLayers) -> Subject:
    """The first of each group of following layers, used as often as the group is long.

    Raises:
        ConfigError: layers that do not go into groups of equal length, or a model without repeated layers.
    """
    anatomy = subject.anatomy()
    depths = {len(stack) for stack in anatomy.blocks}
    if anatomy.fusion is None:
        raise ConfigError("a sasrec cannot share layers; prune its layers, or make a student with fewer")
    if len(depths) != 1 or (depth := depths.pop()) % step.layers or depth == step.layers:
        raise ConfigError(
            f"{step.layers} shared layers for blocks of {', '.join(str(len(one)) for one in anatomy.blocks)}; every "
            "block has to have the same number of layers, and more than are left by a whole factor"
        )
    group = depth // step.layers
    old = subject.model.state_dict()
    weights = {name: tensor for name, tensor in old.items() if not name.startswith("blocks.")}
    for block in range(len(anatomy.blocks)):
        for place in range(step.layers):
            source = anatomy.layer_name(block, place * group)
            made = {name.removeprefix(source): tensor for name, tensor in old.items() if name.startswith(source)}
            weights |= {anatomy.layer_name(block, place) + name: tensor for name, tensor in made.items()}
    blocks = tuple(stack[::group] for stack in anatomy.blocks)
    return reshaped(subject, anatomy.with_layers(blocks, repeats=group), weights, anatomy.width)


def student(subject: Subject, step: Student) -> Subject:
    """A new model with other options; tensors of the same name and shape are the original's.

    Raises:
        ConfigError: options that the model does not take.
    """
    options = dict(subject.choice.options)
    if any(name in step.options for name in REPLACED):
        options.pop("shape", None)
    choice = ModelChoice(subject.choice.kind, {**options, **step.options})
    torch.manual_seed(step.seed)
    model = create_model(choice.kind, subject.schema, choice.options)
    old, new = subject.model.state_dict(), model.state_dict()
    same = {name: tensor for name, tensor in old.items() if name in new and new[name].shape == tensor.shape}
    model.load_state_dict({**new, **same})
    return Subject(choice, subject.schema, model.eval())


def _whole(weights: dict[str, Tensor], name: str) -> Tensor:
    """A projection's weight (outputs, inputs), multiplied out if it is a product already."""
    weight, reduce = weights[f"{name}.weight"], weights.get(f"{name}.reduce.weight")
    return weight if reduce is None else weight @ reduce


def _rank(step: Factorise, matrix: Matrix, weight: Tensor) -> int:
    outputs, inputs = weight.shape
    rank = math.ceil(step.rank * min(outputs, inputs) / step.multiple) * step.multiple
    if rank * (outputs + inputs) >= outputs * inputs:
        raise BuildError(
            f"rank {rank} for {matrix.value} ({inputs} -> {outputs}) makes it no smaller; it pays below "
            f"{outputs * inputs / (outputs + inputs):.0f}: give a smaller rank or multiple, or leave the matrix out"
        )
    return rank


def _two(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(outputs, rank) and (rank, inputs), the singular values shared evenly."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).float(), (root[:, None] * right[:rank]).float()
