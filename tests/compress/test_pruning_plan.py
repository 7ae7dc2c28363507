"""The plan meets its budget by what matters least for its cost, and never leaves nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd.compress.anatomy import Anatomy
from rankd.compress.compression_recipe import Prune, Structure
from rankd.compress.importance import Importance, LayerImportance
from rankd.compress.layer_prices import Yardstick
from rankd.compress.pruning_plan import plan_pruning
from rankd.compress.surgery import Kept
from rankd.errors import BuildError
from rankd.models.layer_shapes import FusionShape, LayerShape

LAYER = LayerShape(heads=4, head_width=8, ffn=64)
MODEL = Anatomy(32, ((LAYER, LAYER), (LAYER, LAYER)), 2, FusionShape(4, 8, 16), hidden=32)
STICK = Yardstick(history=16, candidates=32, encodes=1.0)
WHOLE = STICK.flops(MODEL)


def importance(seed: int = 0, of_loss: bool = True) -> Importance:
    random = np.random.default_rng(seed)
    blocks = tuple(
        tuple(LayerImportance(random.random(4), random.random(64), float(random.random())) for _ in range(2))
        for _ in range(2)
    )
    return Importance(blocks, random.random(32), of_loss)


def left(kept: Kept) -> Anatomy:
    """The sizes of what is kept."""
    blocks = tuple(
        tuple(LayerShape(len(layer.heads), 8, len(layer.neurons)) for layer in stack) for stack in kept.blocks
    )
    return Anatomy(len(kept.channels), blocks, 2, MODEL.fusion, hidden=32)


def plan(share: float, step: Prune, judged: Importance | None = None) -> Kept:
    return plan_pruning(MODEL, judged or importance(), step, STICK.flops, share * WHOLE)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.35, 0.99), st.integers(0, 99), st.booleans(), st.booleans())
def test_the_budget_is_met_and_rounded_as_asked(share: float, seed: int, of_loss: bool, uniform: bool) -> None:
    step = Prune(flops=share, uniform=uniform, ffn_multiple=8, width_multiple=4)
    kept = plan(share, step, importance(seed, of_loss))
    assert STICK.flops(left(kept)) <= share * WHOLE
    assert len(kept.channels) % 4 == 0
    layers = [layer for stack in kept.blocks for layer in stack]
    assert all(len(stack) >= 1 for stack in kept.blocks)
    assert all(len(layer.heads) >= 1 and len(layer.neurons) % 8 == 0 and len(layer.neurons) >= 8 for layer in layers)
    if uniform:
        assert len({len(stack) for stack in kept.blocks}) == 1
        assert len({(len(layer.heads), len(layer.neurons)) for layer in layers}) == 1


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(list(Structure)), st.integers(0, 99))
def test_only_what_is_named_leaves(structure: Structure, seed: int) -> None:
    kept = plan(0.93, Prune(structures=(structure,), flops=0.93, ffn_multiple=4, width_multiple=4), importance(seed))
    layers = [layer for stack in kept.blocks for layer in stack]
    whole = {
        Structure.HEADS: all(len(layer.heads) == 4 for layer in layers),
        Structure.FFN: all(len(layer.neurons) == 64 for layer in layers),
        Structure.LAYERS: len(layers) == 4,
        Structure.WIDTH: len(kept.channels) == 32,
    }
    assert [one for one, untouched in whole.items() if not untouched] == [structure]


def test_the_least_important_leave_first() -> None:
    judged = importance()
    judged.blocks[1][0].heads[:] = [9.0, 1e-6, 9.0, 2e-6]
    judged.blocks[0][1].neurons[10:18] = 1e-9
    step = Prune(structures=(Structure.HEADS, Structure.FFN), flops=0.9, ffn_multiple=8)
    kept = plan(0.9, step, judged)
    assert kept.blocks[1][0].heads.tolist() == [0, 2]
    assert not set(range(10, 18)) & set(kept.blocks[0][1].neurons.tolist())


def test_what_costs_nothing_is_not_pruned() -> None:
    """Heads that the price does not see stay, however little they matter."""
    judged = importance()
    for stack in judged.blocks:
        for layer in stack:
            layer.heads[:] = 0.0
    step = Prune(structures=(Structure.HEADS, Structure.FFN), predicted_ms=1.0, ffn_multiple=8)
    price = 1 / 64
    kept = plan_pruning(
        MODEL, judged, step, lambda model: price * sum(one.ffn for stack in model.blocks for one in stack), 2.0
    )
    assert all(len(layer.heads) == 4 for stack in kept.blocks for layer in stack)
    assert sum(len(layer.neurons) for stack in kept.blocks for layer in stack) == 128


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(BuildError, match=r"cannot be met: the least that pruning heads, ffn leaves costs"):
        plan(0.05, Prune(structures=(Structure.HEADS, Structure.FFN), flops=0.05))


def test_the_width_of_a_sasrec_is_refused() -> None:
    sasrec = Anatomy(32, ((LAYER,),), 2)
    with pytest.raises(BuildError, match="width of a sasrec"):
        plan_pruning(sasrec, importance(), Prune(flops=0.5), STICK.flops, 1.0)
