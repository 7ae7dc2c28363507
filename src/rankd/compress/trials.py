"""The trials of a search on disk: a recipe is carried out, judged on the choosing days and timed, and kept.

    trials/<id>/      trial.json and best.safetensors of a recipe, in int8 its int8.json too; or trial.json alone with
                      the reason why it failed
    trials/.<id>/     one that is not finished: what `smaller_model.py` and `int8_tuning.py` need to go on with it

A finished trial appears by a rename, so that it is there whole or not at all. The id is that of the recipe. Recipes
that differ by int8 alone have the same weights in floats, which are made once.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path

import msgspec

from rankd.build.pack import catalogue_of
from rankd.compress.accuracy_gate import AccuracyGate, gate_days
from rankd.compress.calibration import Calibration, calibration_of
from rankd.compress.compression_recipe import CompressionRecipe
from rankd.compress.exploration import Outcome
from rankd.compress.int8_tuning import float_folder, tidy_tuning, tune_in_int8, tuning_of
from rankd.compress.measured_speed import Speed, SpeedMeter, requests_of
from rankd.compress.quantization import PLAN, check_int8, quantize_and_judge, write_plan
from rankd.compress.record_files import read_record, write_record
from rankd.compress.search_plan import SearchPlan
from rankd.compress.smaller_model import EPOCHS, WEIGHTS, Original, Start, make_smaller, read_subject, tidy_start
from rankd.compress.surgery import Subject
from rankd.errors import RankdError
from rankd.gate_record import GateRecord, Int8Record
from rankd.train.evaluation import Progress

RECORD = "trial.json"


class Made(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model that a recipe made: its sizes, the gate on the choosing days, its speed and the original's beside it.

    `gate` judges it in float32, `int8.gate` its quantized graphs, if it has them: then these are what was timed.
    """

    start: Start
    gate: GateRecord
    speed: Speed
    original_speed: Speed
    int8: Int8Record | None = None

    @property
    def served_gate(self) -> GateRecord:
        """The gate on what serves."""
        return self.gate if self.int8 is None else self.int8.gate

    @property
    def gates(self) -> tuple[GateRecord, ...]:
        """All that has to pass: a run in int8 can be built in floats too."""
        return (self.gate,) if self.int8 is None else (self.gate, self.int8.gate)

    @property
    def kept_in_float(self) -> tuple[str, ...] | None:
        """The layers that stay in floats in int8; None: all."""
        return None if self.int8 is None else self.int8.kept

    @property
    def floats(self) -> float:
        """The share of the layers that compute in floats."""
        return 1.0 if self.int8 is None else len(self.int8.kept) / self.int8.layers


class TrialRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """trial.json. `made` is None for a recipe that could not be done, and `failure` says why."""

    trial_id: str
    label: str
    recipe: CompressionRecipe
    seconds: float
    made: Made | None = None
    failure: str = ""

    def outcome(self, accuracy: str) -> Outcome | None:
        """What the order of a search depends on."""
        if self.made is None:
            return None
        made, start = self.made, self.made.start
        hopeful = all(one.high >= one.bound for gate in made.gates for one in gate.metrics.values())
        kept = made.served_gate.metrics[accuracy].kept
        return Outcome(kept, start.flops, start.parameters, hopeful, made.floats)


class Trials:
    """The trials of one folder, judged by a gate on the choosing days. `known` are the finished ones in the order in
    which they were asked for.

    `calibration` is a file of requests for int8; None: the log's, from before the gate's days.
    """

    def __init__(
        self, folder: Path, original: Original, plan: SearchPlan, gate: AccuracyGate, calibration: Path | None = None
    ) -> None:
        self._folder, self._original, self._plan, self._gate = folder, original, plan, gate
        self._calibration_file = calibration
        self._meter: SpeedMeter | None = None
        self.known: list[TrialRecord] = []

    def find(self, recipe: CompressionRecipe) -> TrialRecord | None:
        """A finished trial."""
        name = trial_id(recipe)
        if again := next((one for one in self.known if one.trial_id == name), None):
            return again
        place = self.folder_of(name) / RECORD
        if not place.exists():
            return None
        record = read_record(place, TrialRecord)
        self.known.append(record)
        return record

    def carry_out(self, recipe: CompressionRecipe, label: str, progress: Progress) -> TrialRecord:
        """Make, judge and time the model of a recipe, or go on with it. What progress raises leaves it unfinished.

        Raises:
            ConfigError, BuildError: the original cannot be measured on the plan's target.
        """
        work = self.folder_of("." + trial_id(recipe))
        work.mkdir(parents=True, exist_ok=True)
        if not (work / RECORD).exists():
            write_record(work / RECORD, self._tried(work, recipe, label, progress))
        record = read_record(work / RECORD, TrialRecord)
        tidy_start(work)
        tidy_tuning(work)
        work.rename(self.folder_of(record.trial_id))
        self.known.append(record)
        return record

    def folder_of(self, name: str) -> Path:
        """Where a trial lies."""
        return self._folder / name

    def _tried(self, work: Path, recipe: CompressionRecipe, label: str, progress: Progress) -> TrialRecord:
        started, meter = time.perf_counter(), self._speed_meter()
        made, failure = None, ""
        try:
            made = self._make(work, recipe, meter, progress)
        except RankdError as error:  # another recipe may do
            failure = str(error)
            for name in (WEIGHTS, PLAN):
                (work / name).unlink(missing_ok=True)
        return TrialRecord(trial_id(recipe), label, recipe, time.perf_counter() - started, made, failure)

    def _make(self, work: Path, recipe: CompressionRecipe, meter: SpeedMeter, progress: Progress) -> Made:
        calibration = self._calibration(recipe)
        start, subject, floats = self._in_floats(float_folder(work, recipe), recipe, progress)
        found, int8 = None, None
        if calibration is not None and tuning_of(recipe) is not None:
            subject, found = tune_in_int8(work, self._original, recipe, subject, calibration, progress)
            floats = None
        if floats is None:
            floats = self._gate.judge(subject.model, progress)
        if calibration is not None:
            int8 = quantize_and_judge(self._gate, subject, recipe, calibration, found, progress)
            write_plan(work, int8.plan)
        record, plan = (None, None) if int8 is None else (int8.record, int8.plan)
        for other in self.known:  # the same model, tuned for another time
            made = other.made
            if made is None or (other.recipe.steps, other.recipe.request) != (recipe.steps, recipe.request):
                continue
            if made.kept_in_float == (None if record is None else record.kept):
                return Made(start, floats, made.speed, made.original_speed, record)
        theirs, speed = meter.measure(subject, recipe.request, plan)
        return Made(start, floats, speed, theirs, record)

    def _in_floats(
        self, folder: Path, recipe: CompressionRecipe, progress: Progress
    ) -> tuple[Start, Subject, GateRecord | None]:
        """The model before int8, its weights in a folder: of a trial that differs by int8 alone, with what the gate
        said of it, or made now."""
        plain = msgspec.structs.replace(recipe, quantize=None)
        for other in self.known:
            made, same = other.made, msgspec.structs.replace(other.recipe, quantize=None) == plain
            if made is None or not same or tuning_of(other.recipe) is not None:
                continue
            folder.mkdir(exist_ok=True)
            for name in (WEIGHTS, EPOCHS):
                if (file := self.folder_of(other.trial_id) / name).exists():
                    shutil.copyfile(file, folder / name)
            return made.start, read_subject(self._original, made.start.choice, folder / WEIGHTS), made.gate
        return *make_smaller(folder, self._original, recipe, progress), None

    def _calibration(self, recipe: CompressionRecipe) -> Calibration | None:
        """Requests for int8, before any work on a recipe that quantizes."""
        if recipe.quantize is None:
            return None
        check_int8()
        dataset, gate = self._gate.dataset, self._gate.gate
        return calibration_of(
            dataset, recipe.quantize, gate_days(dataset, gate)[0], gate.sampled, self._calibration_file
        )

    def _speed_meter(self) -> SpeedMeter:
        if self._meter is None:
            original = self._original
            requests = requests_of(original.dataset, self._gate.events, self._plan)
            catalogue = catalogue_of(original.dataset)
            self._meter = SpeedMeter(original.subject(), catalogue, requests, self._plan)
        return self._meter


def trial_id(recipe: CompressionRecipe) -> str:
    """The same for the same recipe."""
    return hashlib.sha256(msgspec.json.encode(recipe)).hexdigest()[:12]
