"""That the gate refuses: three compressions that must not come out, carried out for real.

In: a run. Out: for each what refused it, and in which words. One that came out is the suite's failure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from rankd.compress.accuracy_gate import DAY_S, gate_days
from rankd.compress.compress_run import compress
from rankd.compress.compression_recipe import CompressionRecipe, FineTuning, Gate, Quantize, Student
from rankd.compress.smaller_model import Original
from rankd.errors import EngineFailure, RankdError
from rankd.train.samples import date_of

DAYS = 10
"""Of the test time: a refusal needs no narrow interval."""
FEW_USERS = 50
BOUNDS = {"gauc": 0.999}
REQUESTS = 128
UNTUNED = FineTuning(epochs=0)
NEXT_TO_NOTHING = {"width": 8, "heads": 1, "layers": 1}
Advance = Callable[[str], None]


def gate_refusals(original: Original, data: Path | None, folder: Path, advance: Advance) -> dict[str, str]:
    """What came of a recipe that is too strong, of scales found on corrupted requests, and of training days.

    Raises:
        EngineFailure: one of them was not refused.
    """
    dataset = original.dataset
    start, _ = gate_days(dataset, Gate())
    gate = Gate(BOUNDS, until=date_of(start + DAYS * DAY_S), min_users=FEW_USERS)
    too_strong = CompressionRecipe((Student(NEXT_TO_NOTHING),), finetune=UNTUNED, gate=gate)
    seen = Gate(since=date_of(dataset.train_until - DAYS * DAY_S))
    cases: Mapping[str, tuple[CompressionRecipe, Path | None]] = {
        "too strong a recipe": (too_strong, None),
        "corrupted calibration": (CompressionRecipe(quantize=Quantize(), gate=gate), _corrupted(folder)),
        "its own training days": (msgspec.structs.replace(too_strong, gate=seen), None),
    }
    refused = {}
    for name, (recipe, calibrate) in cases.items():
        advance(f"the gate, {name}")
        try:
            compress(original.folder, recipe, folder / name.replace(" ", "-"), data, calibrate=calibrate)
        except RankdError as error:
            refused[name] = f"{type(error).__name__}: {error}"
        else:
            raise EngineFailure(f"the gate let pass what it has to refuse: {name}")
    return refused


def _corrupted(folder: Path) -> Path:
    """A file of requests as a broken export leaves it: right in form, with users and items that nobody knows."""
    lines = [
        msgspec.json.encode({"user_id": f"\ufffd{number}", "candidates": [f"\ufffd{number}.{c}" for c in range(8)]})
        for number in range(REQUESTS)
    ]
    path = folder / "corrupted.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path
