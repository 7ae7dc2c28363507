"""The trials of a search on disk: a recipe is carried out, judged on the choosing days and timed, and kept.

    trials/<id>/      trial.json and best.safetensors of a recipe, or trial.json alone with the reason why it failed
    trials/.<id>/     one that is not finished: what `compress_run.py` needs to go on with it

A finished trial appears by a rename, so that it is there whole or not at all. The id is that of the recipe.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import msgspec

from rankd.build.pack import catalogue_of
from rankd.compress.accuracy_gate import gate_events, scored, verdict
from rankd.compress.compress_run import Original, Start, make_smaller, read_record, tidy, write_record
from rankd.compress.compression_recipe import CompressionRecipe, Gate
from rankd.compress.exploration import Outcome
from rankd.compress.measured_speed import Speed, SpeedMeter, requests_of
from rankd.compress.search_plan import SearchPlan
from rankd.compress.surgery import Subject
from rankd.errors import RankdError
from rankd.gate_record import GateRecord
from rankd.train.evaluation import Progress

RECORD = "trial.json"


class Made(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model that a recipe made: its sizes, the gate on the choosing days, its speed and the original's beside it."""

    start: Start
    gate: GateRecord
    speed: Speed
    original_speed: Speed


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
        gate, start = self.made.gate, self.made.start
        hopeful = all(one.high >= one.bound for one in gate.metrics.values())
        return Outcome(gate.metrics[accuracy].kept, start.flops, start.parameters, hopeful)


class Trials:
    """The trials of one folder. `known` are the finished ones in the order in which they were asked for."""

    def __init__(self, folder: Path, original: Original, plan: SearchPlan, days: Gate) -> None:
        self._folder, self._original, self._plan, self._days = folder, original, plan, days
        self._events = gate_events(original.dataset, days)
        self._theirs = scored(original.model, original.dataset, self._events, lambda done, total, line: None)
        self._meter: SpeedMeter | None = None
        self.known: list[TrialRecord] = []

    def find(self, recipe: CompressionRecipe) -> TrialRecord | None:
        """A finished trial."""
        place = self.folder_of(trial_id(recipe))
        if not (place / RECORD).exists():
            return None
        record = read_record(place / RECORD, TrialRecord)
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
        tidy(work)
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
            (work / "best.safetensors").unlink(missing_ok=True)
        return TrialRecord(trial_id(recipe), label, recipe, time.perf_counter() - started, made, failure)

    def _make(self, work: Path, recipe: CompressionRecipe, meter: SpeedMeter, progress: Progress) -> Made:
        original = self._original
        start, model = make_smaller(work, original, recipe, progress)
        mine = scored(model, original.dataset, self._events, progress)
        gate = verdict(self._theirs, mine, original.dataset, self._days)
        for other in self.known:  # the same model, tuned for another time
            if other.made is not None and (other.recipe.steps, other.recipe.request) == (recipe.steps, recipe.request):
                return Made(start, gate, other.made.speed, other.made.original_speed)
        theirs, speed = meter.measure(Subject(start.choice, original.dataset.schema, model), recipe.request)
        return Made(start, gate, speed, theirs)

    def _speed_meter(self) -> SpeedMeter:
        if self._meter is None:
            original = self._original
            requests = requests_of(original.dataset, self._events, self._plan)
            catalogue = catalogue_of(original.dataset)
            self._meter = SpeedMeter(original.subject(), catalogue, requests, self._plan)
        return self._meter


def trial_id(recipe: CompressionRecipe) -> str:
    """The same for the same recipe."""
    return hashlib.sha256(msgspec.json.encode(recipe)).hexdigest()[:12]
