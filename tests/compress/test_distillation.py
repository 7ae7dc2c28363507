"""Distillation losses: those of the definitions, 0 where both models agree, blind to padding."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import expit, log_softmax, rel_entr, softmax
from torch import nn

from rankd.compress.compression_recipe import FineTuning
from rankd.compress.distillation import DistillationLoss, logit_divergence, rank_divergence
from rankd.models.protocol import create_model
from rankd.train.batches import training_batches
from rankd.train.samples import baskets_between
from rankd.train.trainer import loss_of
from tests.train.small_log import RECIPE, TRAINING, small_dataset

NUMBERS = st.floats(-8, 8, width=32)
SCORES = st.integers(2, 6).flatmap(
    lambda count: st.tuples(
        arrays(np.float32, (2, count), elements=NUMBERS),
        arrays(np.float32, (2, count), elements=NUMBERS),
        st.lists(st.integers(1, count), min_size=2, max_size=2),
    )
)


@settings(max_examples=60, deadline=None)
@given(SCORES, st.sampled_from([0.5, 1.0, 3.0]))
def test_rank_divergence_is_that_of_the_definition(
    drawn: tuple[np.ndarray, np.ndarray, list[int]], temperature: float
) -> None:
    mine, theirs, lengths = drawn
    real = torch.arange(mine.shape[1]) < torch.tensor(lengths)[:, None]
    expected = np.mean(
        [
            (softmax(b[:n] / temperature) * (log_softmax(b[:n] / temperature) - log_softmax(a[:n] / temperature))).sum()
            for a, b, n in zip(mine.astype(float), theirs.astype(float), lengths, strict=True)
        ]
    )
    made = rank_divergence(torch.from_numpy(mine), torch.from_numpy(theirs), real, temperature)
    assert made.item() == pytest.approx(temperature**2 * expected / math.log(mine.shape[1]), rel=1e-3, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(SCORES)
def test_logit_divergence_is_that_of_the_definition(drawn: tuple[np.ndarray, np.ndarray, list[int]]) -> None:
    mine, theirs, lengths = drawn
    real = torch.arange(mine.shape[1]) < torch.tensor(lengths)[:, None]
    p, q = expit(theirs.astype(float)), expit(mine.astype(float))
    expected = (rel_entr(p, q) + rel_entr(1 - p, 1 - q))[real.numpy()].mean()
    made = logit_divergence(torch.from_numpy(mine)[..., None], torch.from_numpy(theirs)[..., None], real)
    assert made.item() == pytest.approx(expected, rel=1e-3, abs=1e-5)


DATASET = small_dataset()
SAMPLES, _ = baskets_between(DATASET, 0, DATASET.train_until)
(BATCH,) = islice(training_batches(DATASET, SAMPLES, TRAINING, 0), 1)
WEIGHTS = torch.tensor([task.rank_weight for task in DATASET.schema.tasks])


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return create_model("climber", DATASET.schema, RECIPE.model.options).eval()


def test_a_model_that_agrees_has_only_the_loss_of_its_labels() -> None:
    plan = FineTuning(labels=1.0, logits=2.0, ranks=3.0)
    same = DistillationLoss(model(1), plan, WEIGHTS, 0.5)(model(1), BATCH)
    torch.testing.assert_close(same, loss_of(model(1), BATCH, 0.5), rtol=1e-5, atol=1e-6)
    other = DistillationLoss(model(2), plan, WEIGHTS, 0.5)(model(1), BATCH)
    assert other.item() > same.item() + 1e-3


@pytest.mark.parametrize("plan", [FineTuning(labels=0.0, ranks=0.0), FineTuning(labels=0.0, logits=0.0)])
def test_steps_down_the_loss_come_nearer_to_the_original(plan: FineTuning) -> None:
    smaller = model(2)
    loss = DistillationLoss(model(1), plan, WEIGHTS, 0.5)
    optimiser = torch.optim.Adam(smaller.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimiser.zero_grad()
        made = loss(smaller, BATCH)
        made.backward()
        optimiser.step()
        losses.append(made.item())
    assert losses[-1] < 0.5 * losses[0]


def test_padding_does_not_enter() -> None:
    loss = DistillationLoss(model(1), FineTuning(), WEIGHTS, 0.5)
    poisoned = {**BATCH.candidates, "candidate_numeric": BATCH.candidates["candidate_numeric"].clone()}
    assert not BATCH.real.all()
    poisoned["candidate_numeric"][~BATCH.real] = 1e3
    torch.testing.assert_close(loss(model(2), BATCH), loss(model(2), replace(BATCH, candidates=poisoned)))
