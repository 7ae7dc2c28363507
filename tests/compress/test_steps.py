"""Factorising, sharing, students: each step does what it says and refuses what cannot be."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

from rankd.compress.compression_recipe import Factorise, Matrix, ShareLayers, Student
from rankd.compress.steps import factorise, share_layers, student
from rankd.compress.surgery import Subject
from rankd.errors import BuildError, ConfigError
from tests.compress.made_models import logits, subject_of

OPTIONS = {"width": 16, "heads": 2, "layers": 4, "ffn_ratio": 4, "hidden": 8}
EVERY = tuple(Matrix)


def climber() -> Subject:
    return subject_of("climber", OPTIONS)


def test_a_projection_of_low_rank_is_factorised_without_loss() -> None:
    subject = climber()
    with torch.no_grad():
        for name, parameter in subject.model.named_parameters():
            if name.startswith("blocks.") and parameter.dim() == 2 and "bias" not in name:
                parameter.copy_(parameter[:, :4] @ torch.randn(4, parameter.shape[1]) * 0.3)  # rank 4 of 16
    made = factorise(subject, Factorise(rank=0.25, matrices=EVERY, multiple=4))
    torch.testing.assert_close(logits(made), logits(subject), rtol=1e-3, atol=1e-3)
    layer = made.choice.options["shape"]["blocks"][0][0]
    assert [layer[f"{one.value}_rank"] for one in EVERY] == [4] * 4


def test_a_projection_of_full_rank_loses_and_a_higher_rank_loses_less() -> None:
    subject = climber()
    errors = [
        float((logits(factorise(subject, Factorise(rank=rank, multiple=1))) - logits(subject)).abs().mean())
        for rank in (0.1, 0.7)
    ]
    assert errors[0] > 1.2 * errors[1] > 0


def test_what_is_factorised_can_be_factorised_again() -> None:
    once = factorise(climber(), Factorise(rank=0.5, multiple=4))
    twice = factorise(once, Factorise(rank=0.25, multiple=4))
    assert twice.choice.options["shape"]["blocks"][1][3]["up_rank"] == 4


def test_a_rank_that_saves_nothing_is_refused() -> None:
    with pytest.raises(BuildError, match=r"rank 16 for up \(16 -> 64\) makes it no smaller; it pays below 13"):
        factorise(climber(), Factorise(rank=0.9, multiple=8))


def test_shared_layers_keep_the_depth() -> None:
    subject = climber()
    made = share_layers(subject, ShareLayers(layers=2))
    model = cast(Any, made.model)
    assert [len(block.stack) for block in model.blocks] == [2, 2]
    first, again, third, _ = model.blocks[0].layers
    assert first is again
    assert third is not first
    old = subject.model.state_dict()
    np.testing.assert_array_equal(third.qkv.weight.detach(), old["blocks.0.stack.2.qkv.weight"])
    assert logits(made).isfinite().all()


def test_layers_that_are_alike_can_be_shared_without_loss() -> None:
    subject = climber()
    weights = subject.model.state_dict()
    for name, tensor in weights.items():
        if name.startswith("blocks."):
            block, layer = name.split(".")[1:4:2]
            tensor.copy_(weights[name.replace(f"{block}.stack.{layer}.", f"{block}.stack.0.")])
    torch.testing.assert_close(logits(share_layers(subject, ShareLayers(layers=1))), logits(subject))


@pytest.mark.parametrize("count", [3, 4])
def test_groups_that_do_not_fit_are_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"{count} shared layers for blocks of 4, 4"):
        share_layers(climber(), ShareLayers(layers=count))


def test_a_sasrec_shares_nothing() -> None:
    with pytest.raises(ConfigError, match="sasrec cannot share"):
        share_layers(subject_of("sasrec", {"width": 8}), ShareLayers())


def test_a_student_starts_from_what_fits() -> None:
    subject = climber()
    made = student(subject, Student({"layers": 2, "ffn_ratio": 2}))
    old, new = subject.model.state_dict(), made.model.state_dict()
    assert made.choice.options == {**OPTIONS, "layers": 2, "ffn_ratio": 2}
    for name in ("tokens.item.weight", "blocks.1.stack.1.qkv.weight", "head.4.bias"):
        torch.testing.assert_close(new[name], old[name], rtol=0, atol=0)
    assert new["blocks.0.stack.0.ffn.1.weight"].shape == (32, 16)


def test_a_student_of_a_pruned_model_has_plain_layers_again() -> None:
    shared = share_layers(climber(), ShareLayers(layers=2))
    made = student(shared, Student({"layers": 1}))
    assert "shape" not in made.choice.options
    assert [len(stack) for stack in made.anatomy().blocks] == [1, 1]


def test_a_student_with_an_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="widht"):
        student(climber(), Student({"widht": 8}))
