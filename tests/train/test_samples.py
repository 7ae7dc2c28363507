"""Nothing of the future gets into a sample: histories, snapshots and catalogues are of the time before it."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from rankd.errors import DataError
from rankd.features.schema import UNKNOWN_ROW
from rankd.train.batches import draw_candidates, training_batches
from rankd.train.evaluation import make_test_events
from rankd.train.interactions import InteractionLog
from rankd.train.samples import baskets_between, prepare, seconds_of
from rankd.train.snapshots import take_snapshot
from tests.train.small_log import SHAPES, TRAINING, small_dataset

DATASET = small_dataset()


def cut(log: InteractionLog, end: int) -> InteractionLog:
    """The log as it was before a moment, ids unchanged."""
    import dataclasses

    past = log.before(end)
    fields = ("users", "rows", "events", "times", "baskets", "values", "frame")
    return dataclasses.replace(log, **{name: getattr(log, name)[past] for name in fields})


def test_a_snapshot_knows_nothing_of_later_events() -> None:
    for snapshot in DATASET.snapshots:
        alone = take_snapshot(cut(DATASET.log, snapshot.as_of), snapshot.as_of)
        np.testing.assert_array_equal(snapshot.raw, alone.raw)
        np.testing.assert_array_equal(snapshot.neighbours, alone.neighbours)
        np.testing.assert_array_equal(snapshot.similarities, alone.similarities)


def test_samples_use_what_was_known_before_them() -> None:
    samples, counts = baskets_between(DATASET, 0, DATASET.train_until)
    assert len(samples) + counts["without a positive label"] + counts["before the first snapshot"] == counts["baskets"]
    for sample in samples:
        assert DATASET.snapshots[sample.snapshot].as_of <= sample.time < DATASET.train_until
        assert set(sample.items) <= set(DATASET.snapshots[sample.snapshot].known)
        history = DATASET.history_before(sample.user, sample.time)
        assert len(history) == 0 or history.times[-1] < sample.time


def test_labels_are_the_baskets_events() -> None:
    log = DATASET.log
    samples, _ = baskets_between(DATASET, 0, DATASET.train_until)
    for sample in samples[:50]:
        in_basket = (log.users == sample.user) & (log.times >= sample.time) & (log.times < sample.time + 12 * 7)
        for item, (click, like) in zip(sample.items, sample.labels, strict=True):
            kinds = {log.event_types[event] for event in log.events[in_basket & (log.rows == item)]}
            assert bool(click) == bool(kinds & {"click", "like"})
            assert bool(like) == ("like" in kinds)


def test_test_events_are_fixed_by_their_seed_and_frozen_in_time() -> None:
    end = DATASET.schema.log_end + 1
    one, _ = make_test_events(DATASET, DATASET.validate_until, end, 20, seed=1)
    again, _ = make_test_events(DATASET, DATASET.validate_until, end, 20, seed=1)
    other, _ = make_test_events(DATASET, DATASET.validate_until, end, 20, seed=2)
    assert [event.rows.tolist() for event in one] == [event.rows.tolist() for event in again]
    assert [event.rows.tolist() for event in one] != [event.rows.tolist() for event in other]
    for event in one:
        assert DATASET.snapshots[event.sample.snapshot].as_of == DATASET.validate_until
        assert event.sample.time >= DATASET.validate_until
        known = event.rows[event.rows != UNKNOWN_ROW]
        assert len(known) == len(set(known))
        assert event.labels[:, 0].any()


def test_negatives_are_known_items_outside_of_the_basket() -> None:
    samples, _ = baskets_between(DATASET, 0, DATASET.train_until)
    for number, sample in enumerate(samples[:30]):
        rows, labels = draw_candidates(DATASET, sample, TRAINING, np.random.default_rng(number))
        negatives = rows[len(sample.items) :]
        assert not set(negatives) & set(sample.items)
        assert set(negatives) <= set(DATASET.snapshots[sample.snapshot].known)
        assert not labels[len(sample.items) :].any()


def test_an_epoch_has_every_sample_once_and_is_the_same_again() -> None:
    samples, _ = baskets_between(DATASET, 0, DATASET.train_until)
    one = list(training_batches(DATASET, samples, TRAINING, epoch=0))
    again = list(training_batches(DATASET, samples, TRAINING, epoch=0))
    next_epoch = list(training_batches(DATASET, samples, TRAINING, epoch=1))
    assert sum(len(batch.labels) for batch in one) == len(samples)
    for first, second in zip(one, again, strict=True):
        torch.testing.assert_close(first.labels, second.labels)
        torch.testing.assert_close(first.candidates["candidate_numeric"], second.candidates["candidate_numeric"])
    assert not torch.equal(one[0].candidates["candidate_item"], next_epoch[0].candidates["candidate_item"])


def test_a_split_outside_of_the_log_is_refused() -> None:
    import dataclasses

    log = DATASET.log
    late = msgspec.structs.replace(
        log.description, split=msgspec.structs.replace(log.description.split, validate_until="2030-01-01")
    )
    with pytest.raises(DataError, match="has to cut the log's time"):
        prepare(dataclasses.replace(log, description=late), SHAPES)
    with pytest.raises(DataError, match="write YYYY-MM-DD"):
        seconds_of("first of May")
