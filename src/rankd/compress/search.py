"""A search from end to end: recipes are tried under a time limit, one is picked, judged once more, and made a run.

    <folder>/            begun.json (plan, original, log), trials/, verdicts.json, front.json, front.png
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

from rankd.compress.accuracy_gate import gate_events, judge, split_days
from rankd.compress.compress_run import RECORD as COMPRESSION
from rankd.compress.compress_run import Original, finish, read_record, refusal, write_record
from rankd.compress.exploration import Trial, explore
from rankd.compress.search_plan import RecipeSpace, SearchPlan, packaged_plan, space_of
from rankd.compress.speed_target import Pick, Target
from rankd.compress.trials import Made, TrialRecord, Trials
from rankd.errors import ConfigError, GateRefused
from rankd.gate_record import Compression, GateRecord, Searched
from rankd.models.protocol import create_model
from rankd.train.evaluation import Progress
from rankd.train.run import file_sha256, open_run, share_unseen_items
from rankd.train.trainer import load_weights


class BegunSearch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a folder's search is of."""

    plan: SearchPlan
    original_sha256: str
    data_sha256: str


class Look(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the gate found of a trial on the days that were kept back."""

    trial_id: str
    gate: GateRecord


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
        DataError: the log is not the one of the run, or too few days or users to choose and to judge by.
    """

    def __init__(self, run: Path, folder: Path, plan: SearchPlan | None = None, data: Path | None = None) -> None:
        if (run / COMPRESSION).exists():
            raise ConfigError(f"{run} is a compression itself; search from the run that it was made from")
        self.folder, self.original = folder, Original(run, *open_run(run, data))
        self.plan = plan or self._begun_plan() or packaged_plan(self.original.run.recipe.model.kind)
        self.space: RecipeSpace = space_of(self.plan)
        dataset = self.original.dataset
        self.choosing, self.final = split_days(dataset, self.plan.gate, self.plan.choose_until)
        self._final_events = gate_events(dataset, self.final)  # before any work: there may be too few users
        gate_events(dataset, self.choosing)
        self._begin()
        self.trials = Trials(folder / "trials", self.original, self.plan, self.choosing)

    def start(self, minutes: float, progress: Progress, clock: Callable[[], float] = time.monotonic) -> bool:
        """Try recipes until they have taken so many minutes in all; returns whether there is none left to try.

        Raises:
            ConfigError: not one trial was finished.
        """
        exploration, started, before, limit = explore(self.space), clock(), 0.0, 60 * minutes
        label = ""

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
                else:
                    before += record.seconds
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
        gate = target.judged(self._judged(trial, made, progress))
        looks = len(self.looks())
        if not gate.passed:
            raise GateRefused(
                f"'{trial.label}', chosen on {_days(made.gate)}, is refused on {_days(gate)}, which the search "
                f"did not see: {refusal(gate)}; {out} was not written. {looks} of its recipes were judged on "
                "these days; another try on them proves less each time: search longer, or ask for less"
            )
        recipe = msgspec.structs.replace(trial.recipe, gate=target.gate(self.final))
        searched = Searched(len(self.trials.known), made.gate.since, made.gate.until, looks)
        work, old = (out.with_name(f".{out.name}.{what}") for what in ("choosing", "old"))
        for left in (work, old):  # of a search that was killed here
            shutil.rmtree(left, ignore_errors=True)
        work.mkdir(parents=True)
        for file in self.trials.folder_of(trial.trial_id).glob("[!t]*"):  # weights and epochs, not trial.json
            shutil.copyfile(file, work / file.name)
        if out.exists():
            out.rename(old)
        compression = finish(work, out, self.original, recipe, made.start, gate, search=searched)
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

    def _judged(self, trial: TrialRecord, made: Made, progress: Progress) -> GateRecord:
        """The gate's figures of a trial on the days that were kept back: what was found before, or now."""
        known = {look.trial_id: look.gate for look in self.looks()}
        if trial.trial_id in known:
            return known[trial.trial_id]
        original, choice = self.original, made.start.choice
        model = create_model(choice.kind, original.dataset.schema, choice.options)
        load_weights(model, self.trials.folder_of(trial.trial_id) / "best.safetensors")
        share_unseen_items(model, original.dataset)
        gate = judge(original.model, model, original.dataset, self.final, self._final_events, progress)
        write_record(self.folder / "verdicts.json", Looks((*self.looks(), Look(trial.trial_id, gate))))
        return gate

    def _begun_plan(self) -> SearchPlan | None:
        """The plan of the search that was begun here."""
        place = self.folder / "begun.json"
        return read_record(place, BegunSearch).plan if place.exists() else None

    def _begin(self) -> None:
        """Make the folder and hold it, or see that it is of the same search."""
        weights = file_sha256(self.original.folder / "best.safetensors")
        begun, place = BegunSearch(self.plan, weights, self.original.run.data_sha256), self.folder / "begun.json"
        if place.exists() and read_record(place, BegunSearch) != begun:
            raise ConfigError(
                f"{self.folder} holds a search with another plan, model or log; remove it, or name another folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ConfigError(f"another search is under way in {self.folder}; wait for its end") from error
        if not place.exists():
            write_record(place, begun)


def _days(gate: GateRecord) -> str:
    return f"{gate.since} to {gate.until}"
