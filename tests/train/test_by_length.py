"""Batches of requests whose histories are about as long."""

from __future__ import annotations

import msgspec
import numpy as np
import torch

from rankd.models.protocol import create_model, logits_of
from rankd.train.batches import alike_together, fixed_shapes, make_batch, training_batches
from rankd.train.recipe import Training
from rankd.train.samples import baskets_between
from tests.train.small_log import RECIPE, small_dataset

DATASET = small_dataset()
SAMPLES, _ = baskets_between(DATASET, 0, DATASET.train_until)
TRAINING = Training(batch_size=4, negatives=6, max_positives=2, by_length=True)


def test_every_request_comes_once_and_batches_are_alike() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(0, 500, 1003)
    order = alike_together(random.permutation(1003), lengths, 8, np.random.default_rng(1))
    assert sorted(order.tolist()) == list(range(1003))
    spread = [np.ptp(lengths[order[start : start + 8]]) for start in range(0, 1000, 8)]
    assert np.median(spread) < 20, "of 500, and of 400 requests that are sorted together"
    again = alike_together(np.random.default_rng(2).permutation(1003), lengths, 8, np.random.default_rng(1))
    assert again.tolist() != order.tolist()


def test_batches_are_cut_to_the_smallest_bucket() -> None:
    whole = training_batches(DATASET, SAMPLES, msgspec.structs.replace(TRAINING, by_length=False), 0)
    assert {batch.history["history_item"].shape[-1] for batch in whole} == {DATASET.schema.history_length}
    cut = list(training_batches(DATASET, SAMPLES, TRAINING, 0))
    tokens = {batch.history["history_item"].shape[-1] for batch in cut}
    assert tokens <= set(DATASET.schema.history_buckets)
    assert len(tokens) > 1
    assert all(batch.history["history_length"].max() <= batch.history["history_item"].shape[-1] for batch in cut)


def test_a_cut_batch_has_the_scores_of_the_whole() -> None:
    sample = min(SAMPLES, key=lambda one: len(DATASET.history_before(one.user, one.time)))
    model = create_model("climber", DATASET.schema, RECIPE.model.options).eval()
    short = len(DATASET.history_before(sample.user, sample.time))
    rows = sample.items, sample.labels
    whole, cut = (
        make_batch(DATASET, fixed_shapes(DATASET.schema, len(sample.items), tokens), [sample], [rows])
        for tokens in (None, short)
    )
    assert cut.history["history_item"].shape[-1] < whole.history["history_item"].shape[-1]
    with torch.inference_mode():
        expected, given = (logits_of(model, one.history, one.candidates) for one in (whole, cut))
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)
