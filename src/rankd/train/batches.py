"""Batches of training requests: samples with freshly drawn negatives, packed by the same assembly as in serving."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from rankd.features.assembly import assemble, bucket_of
from rankd.features.schema import FeatureSchema
from rankd.train.recipe import Training
from rankd.train.samples import Dataset, Sample
from rankd.types import Features, Float32Array, Int32Array, Int64Array

QUEUED = 4
SORTED_TOGETHER = 50
"""Batches' worth of requests that are sorted by length together: so few that batches differ from epoch to epoch."""


@dataclass(frozen=True, slots=True)
class Batch:
    """B requests as tensors, labels (B, C, K), and `real` (B, C) bool: which candidates are not padding."""

    history: Mapping[str, Tensor]
    candidates: Mapping[str, Tensor]
    labels: Tensor
    real: Tensor


def fixed_shapes(schema: FeatureSchema, num_candidates: int, tokens: int | None = None) -> FeatureSchema:
    """The schema with one history bucket, the smallest that holds `tokens` (None: the longest), and one candidate
    bucket, so that requests stack into batches."""
    bucket = schema.history_length if tokens is None else bucket_of(tokens, schema.history_buckets)
    return msgspec.structs.replace(schema, history_buckets=(bucket,), candidate_buckets=(num_candidates,))


def training_batches(dataset: Dataset, samples: Sequence[Sample], training: Training, epoch: int) -> Iterator[Batch]:
    """One epoch: every sample once, in an order and with negatives that depend on the seed and the epoch alone."""
    random = np.random.default_rng((training.seed, epoch))
    order = random.permutation(len(samples))
    starts = range(0, len(order), training.batch_size)
    seeds = random.integers(2**32, size=len(starts))
    lengths = None
    if training.by_length:
        lengths = np.asarray([len(dataset.history_before(sample.user, sample.time)) for sample in samples])
        order = alike_together(order, lengths, training.batch_size, random)

    def build(index: int) -> Batch:
        chosen = order[starts[index] : starts[index] + training.batch_size]
        picked = [samples[i] for i in chosen]
        tokens = None if lengths is None else int(lengths[chosen].max())
        schema = fixed_shapes(dataset.schema, training.max_positives + training.negatives, tokens)
        drawn = [
            draw_candidates(dataset, s, training, np.random.default_rng((seeds[index], n)))
            for n, s in enumerate(picked)
        ]
        return make_batch(dataset, schema, picked, drawn)

    with ThreadPoolExecutor(1, thread_name_prefix="rankd-batches") as pool:
        waiting = [pool.submit(build, index) for index in range(min(QUEUED, len(starts)))]
        for index in range(len(starts)):
            batch = waiting.pop(0).result()
            if index + QUEUED < len(starts):
                waiting.append(pool.submit(build, index + QUEUED))
            yield batch


def alike_together(order: Int64Array, lengths: Int64Array, size: int, random: np.random.Generator) -> Int64Array:
    """The order such that each batch of `size` has requests whose histories are about as long; a last, smaller batch
    stays the last."""
    window = SORTED_TOGETHER * size
    parts = [order[start : start + window] for start in range(0, len(order), window)]
    sorted_parts = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
    whole = len(order) // size * size
    batches = random.permutation(sorted_parts[:whole].reshape(-1, size))
    return np.concatenate([batches.ravel(), sorted_parts[whole:]])


def draw_candidates(
    dataset: Dataset, sample: Sample, training: Training, random: np.random.Generator
) -> tuple[Int32Array, Float32Array]:
    """A sample's items (at most `max_positives` of them) and uniformly drawn negatives, with their labels."""
    items, labels = sample.items, sample.labels
    if len(items) > training.max_positives:
        keep = random.choice(len(items), training.max_positives, replace=False)
        items, labels = items[keep], labels[keep]
    known = dataset.snapshots[sample.snapshot].known
    drawn = known[random.integers(len(known), size=training.negatives)]
    drawn = np.unique(drawn[~np.isin(drawn, sample.items)])
    rows = np.concatenate([items, drawn]).astype(np.int32)
    return rows, np.concatenate([labels, np.zeros((len(drawn), labels.shape[1]), np.float32)])


def make_batch(
    dataset: Dataset,
    schema: FeatureSchema,
    samples: Sequence[Sample],
    candidates: Sequence[tuple[Int32Array, Float32Array]],
) -> Batch:
    """Stack samples with their candidate rows and labels; `schema` has fixed shapes."""
    width = schema.candidate_buckets[-1]
    labels = np.zeros((len(samples), width, len(schema.tasks)), np.float32)
    real = np.zeros((len(samples), width), bool)
    packed: list[Features] = []
    for number, (sample, (rows, truth)) in enumerate(zip(samples, candidates, strict=True)):
        packed.append(sample_features(dataset, schema, sample, rows))
        labels[number, : len(rows)] = truth
        real[number, : len(rows)] = True
    return Batch(
        history=as_tensors([features.history for features in packed]),
        candidates=as_tensors([features.candidates for features in packed]),
        labels=torch.from_numpy(labels),
        real=torch.from_numpy(real),
    )


def sample_features(dataset: Dataset, schema: FeatureSchema, sample: Sample, rows: Int32Array) -> Features:
    """One sample as the server would see it at the sample's time."""
    return assemble(
        schema,
        dataset.tables[sample.snapshot],
        dataset.history_before(sample.user, sample.time),
        rows,
        dataset.users[sample.user],
        sample.time,
    )


def as_tensors(arrays: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
    """Inputs of requests of one shape, side by side."""
    return {name: torch.from_numpy(np.concatenate([one[name] for one in arrays])) for name in arrays[0]}
