"""Calibration requests: the newest of the log before the gate, or a file's; wrong ones are refused with the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankd.compress.calibration import calibration_of, check_numbers
from rankd.compress.compression_recipe import Quantize
from rankd.errors import DataError
from rankd.features.assembly import assemble
from rankd.types import Features
from tests.train.small_log import small_dataset

DATASET = small_dataset()
LOG, UNTIL = DATASET.log, DATASET.validate_until
PLAN = Quantize(requests=32, min_requests=16)


def lines_of(count: int = 20, **changes: Any) -> list[dict[str, Any]]:
    """Requests of different users for different items."""
    return [
        {"user_id": LOG.user_ids[number], "candidates": list(LOG.item_ids[number : number + 5]), **changes}
        for number in range(count)
    ]


def write(folder: Path, lines: list[dict[str, Any]]) -> Path:
    path = folder / "requests.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_the_logs_requests_are_the_newest_before_the_gate_and_have_no_padding() -> None:
    made = calibration_of(DATASET, PLAN, UNTIL, 10)
    assert len(made.requests) == 32
    assert made.sha256 == ""
    for features in made.requests:
        assert features.candidates["candidate_item"].shape == (1, features.num_candidates)
        lengths = features.history["history_length"]
        assert features.history["history_item"].shape[2] == max(int(lengths.max()), 1)
        times = features.candidates["context_time"] + DATASET.schema.time_origin
        assert times.max() < UNTIL


def test_a_files_requests_are_what_the_server_would_assemble(tmp_path: Path) -> None:
    time = UNTIL - 1000
    made = calibration_of(DATASET, PLAN, UNTIL, 10, write(tmp_path, lines_of(time=time)))
    assert len(made.requests) == 20
    assert len(made.sha256) == 64
    snapshot = int(np.searchsorted([one.as_of for one in DATASET.snapshots], time, side="right")) - 1
    expected = assemble(
        DATASET.schema, DATASET.tables[snapshot], DATASET.history_before(3, time), np.arange(5, 10, dtype=np.int32),
        DATASET.users[3], time,
    )  # fmt: skip
    for name, array in made.requests[3].candidates.items():
        np.testing.assert_array_equal(array, expected.candidates[name][:, :5] if array.ndim > 1 else array)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (lines_of(5), "5 different requests of 5; ranges of activations need 16"),
        (lines_of(1) * 40, "1 different requests of 32"),
        (lines_of(candidates=["no such film"]), "100% of its items are not in the log"),
        (lines_of(user_id="nobody"), "100% of its users are not in the log"),
        (lines_of(time=UNTIL), "the gate judges from .* on"),
        (lines_of(time=0), "a calibration request is of 1970-01-01; the log's items are known from"),
        (lines_of(candidates=[]), "line 1: .*length >= 1"),
        (lines_of(candidate=["x"]), "line 1: .*candidate"),
        (lines_of(time="yesterday"), "line 1: .*Expected `int"),
        ([*lines_of(2), {"user": "x"}], "line 3: .*user"),
    ],
)
def test_a_file_of_other_requests_is_refused(tmp_path: Path, lines: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        calibration_of(DATASET, PLAN, UNTIL, 10, write(tmp_path, lines))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"\x89PNG\r\n", "line 1"), (b'{"user_id": "\xff"}', "line 1"), (None, "No such file")],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "requests.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        calibration_of(DATASET, PLAN, UNTIL, 10, path)


def test_too_few_requests_in_the_log_are_refused() -> None:
    with pytest.raises(DataError, match="the log's newest requests before the gate's days: 32 different requests"):
        calibration_of(DATASET, Quantize(requests=32, min_requests=33), UNTIL, 10)


def test_features_that_are_no_numbers_are_refused_by_name() -> None:
    first = calibration_of(DATASET, PLAN, UNTIL, 10).requests[0]
    broken = dict(first.candidates) | {"candidate_numeric": first.candidates["candidate_numeric"] * np.nan}
    with pytest.raises(DataError, match=r"request 2 of 2 has .* values in candidate_numeric that are no numbers"):
        check_numbers([first, Features(first.history, broken, first.num_candidates)], "here")
