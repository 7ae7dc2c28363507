"""What to leave out under a budget: always next what matters least for what it costs, over the whole model at once.

In: a model's anatomy, importance, the price of an anatomy (FLOPs or predicted milliseconds), a budget. Out: `Kept`.
The budget is global: which layer loses how much follows from importance and cost, and from no share of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from rankd.compress.anatomy import Anatomy
from rankd.compress.compression_recipe import Prune, Structure
from rankd.compress.importance import Float64Array, Importance
from rankd.compress.surgery import Indices, Kept, KeptLayer
from rankd.errors import BuildError

Price = Callable[[Anatomy], float]


@dataclass(frozen=True, slots=True)
class Left:
    """How much is left of a layer; which heads and neurons those are follows from their importance."""

    number: int
    heads: int
    neurons: int


@dataclass(frozen=True, slots=True)
class Remainder:
    """How much is left of a model."""

    channels: int
    blocks: tuple[tuple[Left, ...], ...]


@dataclass(frozen=True, slots=True)
class Move:
    """A smaller remainder, and the importance of each thing that it leaves out."""

    after: Remainder
    lost: Float64Array


def plan_pruning(anatomy: Anatomy, importance: Importance, step: Prune, price: Price, budget: float) -> Kept:
    """What stays at a price of at most `budget`. Something always stays: a layer in each block, a head in each layer.

    Raises:
        BuildError: the budget cannot be met, or channels of a model that cannot lose any.
    """
    if Structure.WIDTH in step.structures and not anatomy.has_prunable_width():
        raise BuildError("the embedding width of a sasrec cannot be pruned; name other structures, or make a student")
    now = Remainder(
        anatomy.width,
        tuple(
            tuple(Left(number, layer.heads, layer.ffn) for number, layer in enumerate(stack))
            for stack in anatomy.blocks
        ),
    )
    cost = price(anatomy)
    while cost > budget:
        best, least = None, np.inf
        for move in _moves(now, importance, step):
            saved = cost - price(_anatomy(anatomy, move.after))
            if saved <= 0:
                continue
            loss = float(move.lost.sum() / saved if importance.of_loss else move.lost.mean())
            if loss < least:
                best, least = move, loss
        if best is None:
            raise BuildError(
                f"the budget of {budget:.4g} cannot be met: the least that pruning "
                f"{', '.join(one.value for one in step.structures)} leaves costs {cost:.4g}; raise the budget, "
                "allow more structures or smaller multiples"
            )
        now = best.after
        cost = price(_anatomy(anatomy, now))
    return _kept(now, importance)


def _moves(now: Remainder, importance: Importance, step: Prune) -> Iterator[Move]:
    """Every next thing to leave out. `uniform`: from all layers, or from all blocks, at once."""
    places = [(block, place) for block, stack in enumerate(now.blocks) for place in range(len(stack))]
    groups = [places] if step.uniform else [[place] for place in places]
    for group in groups:
        if Structure.HEADS in step.structures:
            yield from _fewer(now, importance, group, "heads", 1)
        if Structure.FFN in step.structures:
            yield from _fewer(now, importance, group, "neurons", step.ffn_multiple)
    if Structure.LAYERS in step.structures:
        yield from _without_layers(now, importance, step.uniform)
    fewer = _next(now.channels, step.width_multiple)
    if Structure.WIDTH in step.structures and fewer:
        yield Move(replace(now, channels=fewer), np.sort(importance.channels)[-now.channels : -fewer])


def _fewer(
    now: Remainder, importance: Importance, group: list[tuple[int, int]], field: str, multiple: int
) -> Iterator[Move]:
    """The least important heads or neurons of each layer of a group leave."""
    blocks, lost = [list(stack) for stack in now.blocks], []
    for block, place in group:
        layer = blocks[block][place]
        count: int = getattr(layer, field)
        fewer = _next(count, multiple)
        if not fewer:
            return
        scores: Float64Array = getattr(importance.blocks[block][layer.number], field)
        lost.append(np.sort(scores)[-count:-fewer])
        blocks[block][place] = replace(layer, **{field: fewer})
    yield Move(replace(now, blocks=tuple(map(tuple, blocks))), np.concatenate(lost))


def _without_layers(now: Remainder, importance: Importance, uniform: bool) -> Iterator[Move]:
    """One layer leaves, or the least important one of each block."""
    scores = [[importance.blocks[n][layer.number].whole for layer in stack] for n, stack in enumerate(now.blocks)]
    if uniform:
        chosen = [[(block, int(np.argmin(one)))] for block, one in enumerate(scores)]
        groups = [[place for places in chosen for place in places]]
    else:
        groups = [[(block, place)] for block, one in enumerate(scores) for place in range(len(one))]
    for group in groups:
        if any(len(now.blocks[block]) == 1 for block, _ in group):
            continue
        blocks = [
            tuple(layer for place, layer in enumerate(stack) if (block, place) not in group)
            for block, stack in enumerate(now.blocks)
        ]
        yield Move(replace(now, blocks=tuple(blocks)), np.asarray([scores[block][place] for block, place in group]))


def _next(count: int, multiple: int) -> int:
    """The next smaller multiple; 0 if there is none."""
    return (count - 1) // multiple * multiple


def _anatomy(anatomy: Anatomy, left: Remainder) -> Anatomy:
    """The sizes of what is left."""
    blocks = tuple(
        tuple(
            msgspec.structs.replace(anatomy.blocks[block][layer.number], heads=layer.heads, ffn=layer.neurons)
            for layer in stack
        )
        for block, stack in enumerate(left.blocks)
    )
    return replace(anatomy, width=left.channels, blocks=blocks)


def _kept(left: Remainder, importance: Importance) -> Kept:
    blocks = tuple(
        tuple(
            KeptLayer(
                layer.number,
                _most(importance.blocks[block][layer.number].heads, layer.heads),
                _most(importance.blocks[block][layer.number].neurons, layer.neurons),
            )
            for layer in stack
        )
        for block, stack in enumerate(left.blocks)
    )
    return Kept(_most(importance.channels, left.channels), blocks)


def _most(scores: Float64Array, count: int) -> Indices:
    """The `count` most important, in their own order."""
    return np.sort(np.argsort(scores, kind="stable")[len(scores) - count :])
