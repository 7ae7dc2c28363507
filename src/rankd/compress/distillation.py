"""Distillation: what the smaller model learns from the original, beside the labels.

In: logits (B, C, K) of both on the same batch. Out: a loss that is 0 where they agree. Candidates that are padding
count nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankd.compress.compression_recipe import FineTuning
from rankd.models.protocol import logits_of
from rankd.train.batches import Batch
from rankd.train.trainer import supervised_loss


@dataclass(frozen=True, slots=True)
class DistillationLoss:
    """The loss of fine-tuning: labels, the original's probabilities, the original's ranking; `plan` weighs them.

    `rank_weights` (K,) make one score of a candidate's logits, as serving does; `listwise` is that of the run.
    """

    original: nn.Module
    plan: FineTuning
    rank_weights: Tensor
    listwise: float

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch, to be minimised over the weights of `model`."""
        logits = logits_of(model, batch.history, batch.candidates).float()
        with torch.no_grad():
            wanted = logits_of(self.original, batch.history, batch.candidates).float()
        total = logits.new_zeros(())
        if self.plan.labels:
            total = total + self.plan.labels * supervised_loss(logits, batch, self.listwise)
        if self.plan.logits:
            total = total + self.plan.logits * logit_divergence(logits, wanted, batch.real)
        if self.plan.ranks:
            mine, theirs = ((one * self.rank_weights).sum(-1) for one in (logits, wanted))
            total = total + self.plan.ranks * rank_divergence(mine, theirs, batch.real, self.plan.temperature)
        return total


def logit_divergence(logits: Tensor, wanted: Tensor, real: Tensor) -> Tensor:
    """Mean over real candidates and tasks of KL(wanted probability || probability), both of yes and no.

    logits, wanted (B, C, K); real (B, C) bool.
    """
    probability = torch.sigmoid(wanted)
    cross = functional.binary_cross_entropy_with_logits(logits, probability, reduction="none")
    own = functional.binary_cross_entropy_with_logits(wanted, probability, reduction="none")
    weight = real.float()
    return ((cross - own).mean(-1) * weight).sum() / weight.sum()


def rank_divergence(scores: Tensor, wanted: Tensor, real: Tensor, temperature: float) -> Tensor:
    """Mean over requests of KL(wanted ranking || ranking), over log C: softmaxes over a request's real candidates.

    scores, wanted (B, C); real (B, C) bool. The factor temperature^2 keeps gradients alike at all temperatures
    (Hinton et al. 2015).
    """
    mine = torch.log_softmax((scores / temperature).masked_fill(~real, -1e9), dim=-1)
    theirs = torch.log_softmax((wanted / temperature).masked_fill(~real, -1e9), dim=-1)
    divergence = functional.kl_div(mine, theirs, reduction="none", log_target=True).masked_fill(~real, 0.0)
    return temperature**2 * divergence.sum(-1).mean() / math.log(max(real.shape[1], 2))
