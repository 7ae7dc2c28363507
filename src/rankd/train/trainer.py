"""Training: a dataset and a recipe become weights in a run folder, epoch by epoch, resumable after any of them.

    runs/<name>/
      run.json             the description, the recipe, the log's path and counts
      checkpoint.pt        everything needed to go on: weights, optimiser, history of epochs (rewritten atomically)
      best.safetensors     the weights of the best epoch by validation
      epochs.jsonl         one line an epoch: losses, validation metrics, seconds

The random numbers of an epoch depend on the seed and its number alone, so a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rankd.errors import ConfigError, DataError
from rankd.features.schema import FIRST_ITEM_ROW
from rankd.models.protocol import create_model, logits_of
from rankd.train.batches import Batch, as_tensors, sample_features, training_batches
from rankd.train.evaluation import Progress, Scorer, make_test_events, score_events
from rankd.train.ranking_metrics import evaluate
from rankd.train.recipe import Recipe
from rankd.train.samples import Dataset, Sample, baskets_between, date_of
from rankd.types import Float32Array, Int32Array

WARM_UP_STEPS = 100
VALIDATION_SAMPLED = 100


class Trainer:
    """Runs a recipe over a dataset in a folder. `start()` trains or goes on; `model` holds the best weights after.

    What is validated and kept is an exponential average of the weights over steps: it is steadier than the last ones.
    `model` is where training starts, by default a new one; `loss` takes the place of the supervised one.
    """

    def __init__(
        self,
        dataset: Dataset,
        recipe: Recipe,
        folder: Path,
        model: nn.Module | None = None,
        loss: Callable[[nn.Module, Batch], Tensor] | None = None,
    ) -> None:
        self.dataset, self.recipe, self.folder = dataset, recipe, folder
        torch.manual_seed(recipe.training.seed)
        self.model = model or create_model(recipe.model.kind, dataset.schema, recipe.model.options)
        self._loss = loss or partial(loss_of, listwise=recipe.training.listwise)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.training.learning_rate, weight_decay=recipe.training.weight_decay
        )
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.training.averaging))
        self.epochs: list[dict[str, float]] = []
        self.samples, self.counts = baskets_between(dataset, 0, dataset.train_until)
        self.validation, _ = make_test_events(
            dataset, dataset.train_until, dataset.validate_until, VALIDATION_SAMPLED, recipe.training.seed
        )

    def start(self, progress: Progress = lambda done, total, line: None) -> list[dict[str, float]]:
        """Train until the epochs are over or patience is, from the last checkpoint if any; one dict an epoch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        while len(self.epochs) < self.recipe.training.epochs and self._stale_epochs() < self.recipe.training.patience:
            self.epochs.append(self._epoch(len(self.epochs), progress))
            if self._stale_epochs() == 0:
                weights = _plain(self.average.module)
                save_file(weights, _part(self.folder / "best.safetensors"), seen_days(self.dataset))
                _finish(self.folder / "best.safetensors")
            self._checkpoint()
        load_weights(self.model, self.folder / "best.safetensors")
        return self.epochs

    def _epoch(self, number: int, progress: Progress) -> dict[str, float]:
        training = self.recipe.training
        torch.manual_seed(training.seed * 100_003 + number)
        steps = math.ceil(len(self.samples) / training.batch_size)
        started, total = time.perf_counter(), 0.0
        self.model.train()
        for step, batch in enumerate(training_batches(self.dataset, self.samples, training, number)):
            self._set_learning_rate(number * steps + step, steps)
            with torch.autocast("cpu", torch.bfloat16, enabled=training.precision == "bf16"):
                loss = self._loss(self.model, batch)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            self.average.update_parameters(self.model)
            total += loss.item()
            progress(step + 1, steps, f"epoch {number + 1}, loss {total / (step + 1):.4f}")
        metrics = self._validate()
        return {"loss": total / steps, **metrics, "seconds": round(time.perf_counter() - started, 1)}

    def _validate(self) -> dict[str, float]:
        scorer = torch_scorer(self.average.module.eval(), self.dataset)
        scored = score_events(self.validation, scorer, self.dataset.schema, logits=True)
        intervals = evaluate(scored)
        return {f"validation {name}": interval.value for name, interval in intervals.items()}

    def _set_learning_rate(self, step: int, steps_an_epoch: int) -> None:
        """Linear warm-up, then a cosine down to a tenth over all epochs."""
        total = steps_an_epoch * self.recipe.training.epochs
        cosine = 0.55 + 0.45 * math.cos(math.pi * min(step / total, 1.0))
        rate = self.recipe.training.learning_rate * min((step + 1) / WARM_UP_STEPS, 1.0) * cosine
        for group in self.optimiser.param_groups:
            group["lr"] = rate

    def _stale_epochs(self) -> int:
        """Epochs since the best one."""
        quality = [epoch["validation ndcg@10"] + epoch["validation gauc"] for epoch in self.epochs]
        return len(quality) - 1 - int(np.argmax(quality)) if quality else 0

    def _checkpoint(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "epochs": self.epochs,
            "recipe": msgspec.json.encode(self.recipe),
        }
        torch.save(state, _part(self.folder / "checkpoint.pt"))
        _finish(self.folder / "checkpoint.pt")
        lines = b"".join(msgspec.json.encode(epoch) + b"\n" for epoch in self.epochs)
        _part(self.folder / "epochs.jsonl").write_bytes(lines)
        _finish(self.folder / "epochs.jsonl")

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        state: dict[str, Any] = torch.load(path, weights_only=True)
        if state["recipe"] != msgspec.json.encode(self.recipe):
            raise ConfigError(
                f"{self.folder} holds a run of another recipe; train into a new folder, or remove this one"
            )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.epochs = state["epochs"]


def loss_of(model: nn.Module, batch: Batch, listwise: float) -> Tensor:
    """The supervised loss of a model on a batch."""
    return supervised_loss(logits_of(model, batch.history, batch.candidates), batch, listwise)


def supervised_loss(logits: Tensor, batch: Batch, listwise: float) -> Tensor:
    """Binary cross-entropy over real candidates and tasks, plus a softmax over each request's candidates (task 0); in
    float32 whatever the logits are in."""
    logits, real = logits.float(), batch.real.float()
    entropy = functional.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none").mean(-1)
    pointwise = (entropy * real).sum() / real.sum()
    first = logits[..., 0].masked_fill(~batch.real, -1e9)
    positives = batch.labels[..., 0]
    chosen = (torch.log_softmax(first, dim=-1) * positives).sum(-1) / positives.sum(-1).clamp(min=1.0)
    return pointwise - listwise * chosen.mean() / math.log(real.shape[1])


def torch_scorer(model: nn.Module, dataset: Dataset) -> Scorer:
    """Score one request at a time with the torch module in float32, in the smallest buckets that hold it: the reference
    that engines are held against."""
    widest = dataset.schema.max_candidates

    @torch.inference_mode()
    def scorer(sample: Sample, rows: Int32Array) -> Float32Array:
        parts = []
        for start in range(0, len(rows), widest):
            features = sample_features(dataset, dataset.schema, sample, rows[start : start + widest])
            logits = logits_of(model, as_tensors([features.history]), as_tensors([features.candidates]))
            parts.append(logits[0, : features.num_candidates].numpy())
        return np.concatenate(parts)

    return scorer


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a run's weights into its model.

    Raises:
        ConfigError: the file is missing or holds another model's tensors.
    """
    try:
        model.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{path} does not hold this model's weights: {error}") from error


def seen_days(dataset: Dataset) -> dict[str, str]:
    """What a weights file says of itself: until when its model was trained and chosen, in seconds since 1970.

    One entry alone: safetensors writes several in any order, and equal weights would have different checksums.
    """
    return {"seen_until": str(dataset.validate_until)}


def check_unseen(path: Path, dataset: Dataset) -> None:
    """Refuse weights that have seen days which a dataset takes for its test time.

    Raises:
        DataError: they were trained or chosen on later days than the dataset's description says.
    """
    with safe_open(path, "pt") as file:
        seen = int((file.metadata() or {}).get("seen_until", 0))
    if seen > dataset.validate_until:
        until, said = date_of(seen), date_of(dataset.validate_until)
        raise DataError(
            f"{path} was trained and chosen on days until {until}, but its description takes all days from {said} on "
            "for days that it has not seen; a model is not judged on its own training days: restore the split, or "
            "train again"
        )


def seen_rows(dataset: Dataset) -> Tensor:
    """(I,) bool: the items that occur in the training time; the embeddings of the others were never trained."""
    mask = torch.zeros(dataset.schema.num_item_rows, dtype=torch.bool)
    mask[torch.from_numpy(dataset.log.rows[dataset.log.before(dataset.train_until)])] = True
    mask[:FIRST_ITEM_ROW] = True
    return mask


def _plain(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _finish(path: Path) -> None:
    """Move a finished .part file into its place."""
    os.replace(_part(path), path)
