"""A search from end to end: recipes are tried under a time limit, one is picked, judged once more, and made a run.

    <folder>/            begun.json (plan, original, log), trials/, verdicts.json, front.json, front.png;
                         calibration.jsonl, if requests for int8 were given
    <folder>/chosen/     the picked model as a run for `rankd build`, if it passed

A search may be interrupted at any moment; the same command goes on with it. What is chosen is judged on days on which
nothing was chosen, and how often somebody has looked at those days is kept in verdicts.json and in the run.
"""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import msgspec

from rankd.build.int8_graphs import Int8Plan
from rankd.compress.accuracy_gate import AccuracyGate, gate_days, split_days
from rankd.compress.calibration import read_events
from rankd.compress.compress_run import RECORD as COMPRESSION
from rankd.compress.compress_run import Passed, finish, refusal
from rankd.compress.exploration import Trial, explore
from rankd.compress.quantization import Judged, judge_again, read_plan
from rankd.compress.record_files import read_record, write_record
from rankd.compress.search_plan import RecipeSpace, SearchPlan, packaged_plan, space_of
from rankd.compress.smaller_model import WEIGHTS, Original, read_subject
from rankd.compress.speed_target import Pick, Target
from rankd.compress.trials import Made, TrialRecord, Trials
from rankd.errors import ConfigError, GateRefused
from rankd.gate_record import Compression, GateRecord, Int8Record, Searched
from rankd.train.evaluation import Progress
from rankd.train.run import file_sha256, open_run

CALIBRATION = "calibration.jsonl"


class BegunSearch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a folder's search is of."""

    plan: SearchPlan
    original_sha256: str
    data_sha256: str
    calibration_sha256: str = ""


class Look(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the gate found of a trial on the days that were kept back; `int8` is of its quantized graphs."""

    trial_id: str
    gate: GateRecord
    int8: Int8Record | None = None


class Looks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """verdicts.json."""

    looks: tuple[Look, ...] = ()


class _OutOfTime(Exception):
    """The limit was reached within a trial."""


class Search:
    """The search of a folder, new or begun before. `start()` tries recipes, `settle()` makes a run of one of them.

    Raises:
        ConfigError: a search of something else was begun in the folder, or one is under way there; a bad plan; a run
            that is a compression itself.
        DataError: the log is not the one of the run, too few days or users to choose and to judge by, or a file of
            requests for int8 (`calibrate`) that cannot be read.
    """

    def __init__(
        self,
        run: Path,
        folder: Path,
        plan: SearchPlan | None = None,
        data: Path | None = None,
        calibrate: Path | None = None,
    ) -> None:
        if (run / COMPRESSION).exists():
            raise ConfigError(f"{run} is a compression itself; search from the run that it was made from")
        self.folder, self.original = folder, Original(run, *open_run(run, data))
        self.plan = plan or self._begun_plan() or packaged_plan(self.original.run.recipe.model.kind)
        self.space: RecipeSpace = space_of(self.plan)
        choosing, final = split_days(self.original.dataset, self.plan.gate, self.plan.choose_until)
        # Both before any work: there may be too few users.
        self._choosing = AccuracyGate(self.original.model, self.original.dataset, choosing)
        self._final = AccuracyGate(self.original.model, self.original.dataset, final)
        self._check_calibration(calibrate)
        begun = self._begin(calibrate)
        file = folder / CALIBRATION if begun.calibration_sha256 else None
        self.trials = Trials(folder / "trials", self.original, self.plan, self._choosing, file)

    def start(self, minutes: float, progress: Progress, clock: Callable[[], float] = time.monotonic) -> bool:
        """Try recipes until they have taken so many minutes in all; returns whether there is none left to try.

        Raises:
            ConfigError: not one trial was finished.
        """
        exploration, started, before, limit = explore(self.space), clock(), 0.0, 60 * minutes
        counted, label = set[str](), ""

        def tick(done: int, total: int, line: str) -> None:
            spent = before + clock() - started
            progress(min(int(spent), int(limit)), int(limit), f"{label}: {line}")
            if spent > limit:
                raise _OutOfTime

        answer, complete = None, False
        try:
            while True:
                trial: Trial = exploration.send(answer)
                label = f"{len(self.trials.known) + 1}: {self.space.label(trial.gene)}, {trial.epochs} epochs"
                recipe = self.space.recipe(trial.gene, trial.epochs)
                record = self.trials.find(recipe)
                if record is None:
                    tick(0, 1, "begun")
                    record = self.trials.carry_out(recipe, self.space.label(trial.gene), tick)
                elif record.trial_id not in counted:
                    before += record.seconds
                counted.add(record.trial_id)
                answer = record.outcome(self.plan.accuracy)
        except StopIteration:
            complete = True
        except _OutOfTime:
            if not self.trials.known:
                raise ConfigError(
                    f"no recipe was finished in {minutes:g} minutes; give --minutes more: what was begun goes on"
                ) from None
        return complete

    def is_new(self) -> bool:
        """Whether no trial was ever finished here."""
        return not any((self.folder / "trials").glob("[!.]*/trial.json"))

    def settle(self, pick: Pick, target: Target, out: Path, progress: Progress) -> Compression:
        """Judge a pick on the days that were kept back, once, and make a run of it in `out`, which is replaced.

        Raises:
            GateRefused: it keeps less than the bounds there; `out` is as it was.
        """
        trial, made = pick.trial, pick.trial.made
        if made is None:
            raise ConfigError(f"'{trial.label}' could not be done: {trial.failure}")
        folder = self.trials.folder_of(trial.trial_id)
        plan = None if made.int8 is None else read_plan(folder, made.int8)
        look = self._look(trial, made, plan, progress)
        gate, int8 = target.judged(look.gate), None
        self._check(trial, made, gate, out)
        if plan is not None and look.int8 is not None:
            int8 = Judged(plan, msgspec.structs.replace(look.int8, gate=target.judged(look.int8.gate)))
            self._check(trial, made, int8.record.gate, out, " in int8")
        recipe = msgspec.structs.replace(trial.recipe, gate=target.gate(self._final.gate))
        searched = Searched(len(self.trials.known), made.gate.since, made.gate.until, len(self.looks()))
        work, old = (out.with_name(f".{out.name}.{what}") for what in ("choosing", "old"))
        for left in (work, old):  # of a search that was killed here
            shutil.rmtree(left, ignore_errors=True)
        work.mkdir(parents=True)
        for file in folder.glob("[!t]*"):  # weights, epochs and scales, not trial.json
            shutil.copyfile(file, work / file.name)
        if out.exists():
            out.rename(old)
        compression = finish(work, out, self.original, Passed(recipe, made.start, gate, int8, searched))
        shutil.rmtree(old, ignore_errors=True)
        return compression

    def looks(self) -> tuple[Look, ...]:
        """What was judged so far on the days that were kept back."""
        place = self.folder / "verdicts.json"
        return read_record(place, Looks).looks if place.exists() else ()

    def close(self) -> None:
        """Let others search in this folder."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _look(self, trial: TrialRecord, made: Made, plan: Int8Plan | None, progress: Progress) -> Look:
        """The gate's figures of a trial on the days that were kept back: what was found before, or now."""
        known = {look.trial_id: look for look in self.looks()}
        if trial.trial_id in known:
            return known[trial.trial_id]
        weights = self.trials.folder_of(trial.trial_id) / WEIGHTS
        subject = read_subject(self.original, made.start.choice, weights)
        gate, int8 = self._final.judge(subject.model, progress), None
        if plan is not None and made.int8 is not None:
            int8 = judge_again(self._final, subject, Judged(plan, made.int8), trial.recipe.request, progress).record
        look = Look(trial.trial_id, gate, int8)
        write_record(self.folder / "verdicts.json", Looks((*self.looks(), look)))
        return look

    def _check(self, trial: TrialRecord, made: Made, gate: GateRecord, out: Path, how: str = "") -> None:
        """Raises GateRefused: the decision on the days that were kept back is no."""
        if gate.passed:
            return
        raise GateRefused(
            f"'{trial.label}', chosen on {_days(made.gate)}, is refused{how} on {_days(gate)}, which the search "
            f"did not see: {refusal(gate)}; {out} was not written. {len(self.looks())} of its recipes were judged on "
            "these days; another try on them proves less each time: search longer, or ask for less"
        )

    def _begun_plan(self) -> SearchPlan | None:
        """The plan of the search that was begun here."""
        place = self.folder / "begun.json"
        return read_record(place, BegunSearch).plan if place.exists() else None

    def _check_calibration(self, file: Path | None) -> None:
        """Read a file of requests for int8, so that a wrong one is refused before any work."""
        if file is None:
            return
        if not self.space.has_int8():
            raise ConfigError(
                f"{file} is for int8, and the plan has no recipe in int8; add quantize = [false, {{}}] to its [vary], "
                "or leave the file out"
            )
        dataset = self.original.dataset
        read_events(file, dataset, gate_days(dataset, self._choosing.gate)[0])

    def _begin(self, calibrate: Path | None) -> BegunSearch:
        """Make the folder and hold it, or see that it is of the same search."""
        place, copied = self.folder / "begun.json", self.folder / CALIBRATION
        known = read_record(place, BegunSearch) if place.exists() else None
        digest = "" if known is None else known.calibration_sha256
        digest = digest if calibrate is None else file_sha256(calibrate)
        weights = file_sha256(self.original.folder / WEIGHTS)
        begun = BegunSearch(self.plan, weights, self.original.run.data_sha256, digest)
        if known is not None and known != begun:
            raise ConfigError(
                f"{self.folder} holds a search with another plan, model or log, or other requests for int8; remove "
                "it, or name another folder"
            )
        if known is not None and digest and file_sha256(copied) != digest:
            raise ConfigError(f"{copied} has changed since the search was begun; remove {self.folder} and begin anew")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ConfigError(f"another search is under way in {self.folder}; wait for its end") from error
        if known is None:
            if calibrate is not None:
                shutil.copyfile(calibrate, copied)
            write_record(place, begun)
        return begun


def _days(gate: GateRecord) -> str:
    return f"{gate.since} to {gate.until}"
