"""Requests to calibrate int8 on: real ones from before the gate's days, and checked before anything is made of them.

In: a dataset and a recipe's `Quantize`; of the log the newest baskets before the gate's days, or a file of requests as
clients send them, one JSON object a line: {"user_id": "17850", "candidates": ["84029E", ...], "time": 1309478400}.
Out: `Calibration`, padded nowhere. Next: `int8_search.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from rankd.compress.compression_recipe import Quantize
from rankd.errors import DataError
from rankd.features.schema import FIRST_ITEM_ROW, UNKNOWN_ROW, TensorSpec, candidate_specs, history_specs
from rankd.train.batches import sample_features
from rankd.train.evaluation import TestEvent, with_candidates
from rankd.train.run import file_sha256
from rankd.train.samples import Dataset, Sample, baskets_between, date_of
from rankd.types import Array, Features, Int32Array

MOST_UNKNOWN = 0.2
"""Of the users or the items of a file; above it the file is taken for one of another model."""


class CalibrationRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of a file. Without a time (seconds since 1970) it is one of the last moment before the gate's days."""

    user_id: str
    candidates: Annotated[list[str], Meta(min_length=1)]
    time: int | None = None


@dataclass(frozen=True, slots=True)
class Calibration:
    """Requests, where they are from, and the checksum of the file ("" for those of the log)."""

    requests: Sequence[Features]
    source: str
    sha256: str = ""


def calibration_of(dataset: Dataset, plan: Quantize, until: int, sampled: int, file: Path | None = None) -> Calibration:
    """The newest requests before `until`, with `sampled` other items each; or those of a file.

    Raises:
        DataError: a file that cannot be read, too few requests or too few different ones, users or items of another
            model, a time in the gate's days, features that are no numbers.
    """
    if file is None:
        samples, _ = baskets_between(dataset, 0, until, keep_unseen=True)
        events = with_candidates(dataset, samples[-plan.requests :], sampled, plan.seed)
        source, digest = "the log's newest requests before the gate's days", ""
    else:
        events = read_events(file, dataset, until)[-plan.requests :]
        source, digest = str(file), file_sha256(file)
    different = len({(event.sample.user, event.sample.time, event.rows.tobytes()) for event in events})
    if different < plan.min_requests:
        raise DataError(
            f"{source}: {different} different requests of {len(events)}; ranges of activations need "
            f"{plan.min_requests}: give more, or lower quantize.min_requests"
        )
    requests = [request_of(dataset, event) for event in events]
    check_numbers(requests, source)
    return Calibration(requests, source, digest)


def request_of(dataset: Dataset, event: TestEvent) -> Features:
    """An event's features, cut to what is real of them: padding would count for the ranges of activations."""
    schema = dataset.schema
    features = sample_features(dataset, schema, event.sample, event.rows[: schema.max_candidates])
    tokens = max(int(features.history["history_length"].max()), 1)
    return Features(
        _cut(features.history, history_specs(schema), "T", tokens),
        _cut(features.candidates, candidate_specs(schema), "C", features.num_candidates),
        features.num_candidates,
    )


def check_numbers(requests: Sequence[Features], source: str) -> None:
    """Raises DataError: a feature of a request is no number."""
    for number, features in enumerate(requests, start=1):
        for name, array in {**features.history, **features.candidates}.items():
            if not np.isfinite(array).all():
                raise DataError(
                    f"{source}: request {number} of {len(requests)} has {int((~np.isfinite(array)).sum())} values in "
                    f"{name} that are no numbers; mend what they come from, or leave such requests out"
                )


def _cut(arrays: Mapping[str, Array], specs: Sequence[TensorSpec], dimension: str, size: int) -> dict[str, Array]:
    axes = {spec.name: spec.shape.index(dimension) for spec in specs if dimension in spec.shape}
    return {
        name: np.ascontiguousarray(array.take(range(size), axis=axes[name])) if name in axes else array
        for name, array in arrays.items()
    }


def read_events(file: Path, dataset: Dataset, until: int) -> list[TestEvent]:
    """The requests of a file, the oldest first; those of users whom the log does not know are left out.

    Raises:
        DataError: a file that cannot be read, users or items of another model, a time in the gate's days.
    """
    log = dataset.log
    users = {name: row for row, name in enumerate(log.user_ids)}
    items = {name: row for row, name in enumerate(log.item_ids, start=FIRST_ITEM_ROW)}
    lines = _read_lines(file)
    rows = [np.asarray([items.get(one, UNKNOWN_ROW) for one in line.candidates], np.int32) for line in lines]
    shares = {
        "users": float(np.mean([line.user_id not in users for line in lines])),
        "items": float(np.mean(np.concatenate(rows) == UNKNOWN_ROW)),
    }
    for what, share in shares.items():
        if share > MOST_UNKNOWN:
            raise DataError(
                f"{file}: {share:.0%} of its {what} are not in the log of this run, allowed are {MOST_UNKNOWN:.0%}; "
                "calibrate on requests for this model"
            )
    known = [(line, some) for line, some in zip(lines, rows, strict=True) if line.user_id in users]
    events = [_event(dataset, users[line.user_id], line.time, some, until) for line, some in known]
    return sorted(events, key=lambda event: event.sample.time)


def _read_lines(file: Path) -> list[CalibrationRequest]:
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from error
    decoder, lines = msgspec.json.Decoder(CalibrationRequest), []
    for number, line in enumerate(raw.splitlines(), start=1):
        try:
            lines.append(decoder.decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DataError(
                f'{file}, line {number}: {error}; a line is {{"user_id": "...", "candidates": ["...", ...], '
                '"time": SECONDS}, the time may be left out'
            ) from error
    if not lines:
        raise DataError(f"{file} is empty; give requests, one JSON object a line")
    return lines


def _event(dataset: Dataset, user: int, time: int | None, rows: Int32Array, until: int) -> TestEvent:
    time = until - 1 if time is None else time
    if time >= until:
        raise DataError(
            f"a calibration request is of {date_of(time)}, and the gate judges from {date_of(until)} on; a model "
            "is not judged on days that it was calibrated on"
        )
    snapshot = int(np.searchsorted([one.as_of for one in dataset.snapshots], time, side="right")) - 1
    if snapshot < 0:
        raise DataError(
            f"a calibration request is of {date_of(time)}; the log's items are known from "
            f"{date_of(dataset.snapshots[0].as_of)} on"
        )
    nothing = np.zeros((len(rows), len(dataset.schema.tasks)), np.float32)
    return TestEvent(Sample(user, time, snapshot, rows, nothing), rows, nothing)
