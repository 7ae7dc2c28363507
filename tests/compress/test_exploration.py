"""The order of a search: everything once, the promising longer, the same for the same seed, repeatable from outside."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from rankd.compress.compression_recipe import FineTuning
from rankd.compress.exploration import Outcome, Trial, explore, promoted
from rankd.compress.search_plan import Gene, RecipeSpace, SearchPlan, StepSpace, space_of

PRUNE = StepSpace("prune", optional=True, vary={"flops": (0.8, 0.6, 0.4, 0.2), "criterion": ("taylor", "magnitude")})
FACTORISE = StepSpace("factorise", optional=True, vary={"rank": (0.5, 0.25)})
PLAN = SearchPlan(steps=(PRUNE, StepSpace("share", optional=True), FACTORISE), finetune=FineTuning(epochs=4), width=6)


def quality(space: RecipeSpace, trial: Trial) -> Outcome | None:
    """A made-up world: more left is better, more epochs are better; shared and factorised cannot be done."""
    steps = {type(step).__name__: step for step in space.recipe(trial.gene, trial.epochs).steps}
    if {"ShareLayers", "Factorise"} <= set(steps):
        return None
    left = getattr(steps.get("Prune"), "flops", 1.0) * (0.9 if "Factorise" in steps else 1.0)
    accuracy = 0.9 + 0.1 * left + 0.002 * trial.epochs - (0.02 if "ShareLayers" in steps else 0.0)
    return Outcome(accuracy, left, left, hopeful=accuracy > 0.95)


def walk(plan: SearchPlan, most: int = 10_000) -> list[Trial]:
    space, trials = space_of(plan), []
    exploration, answer = explore(space), None
    for _ in range(most):
        try:
            trials.append(exploration.send(answer))
        except StopIteration:
            break
        answer = quality(space, trials[-1])
    return trials


def test_every_recipe_is_tried_once_at_each_length_and_then_it_ends() -> None:
    trials = walk(PLAN)
    assert max(Counter(trials).values()) == 1
    assert {trial.gene for trial in trials if trial.epochs == 1} == set(space_of(PLAN).genes())


def test_the_better_half_is_tuned_for_twice_as_long() -> None:
    trials = walk(PLAN, 6 + 3 + 2)
    assert [trial.epochs for trial in trials] == [1] * 6 + [2] * 3 + [4] * 2
    assert {trial.gene for trial in trials[6:9]} <= {trial.gene for trial in trials[:6]}
    assert {trial.gene for trial in trials[9:]} <= {trial.gene for trial in trials[6:9]}


def test_the_first_round_has_each_step_alone() -> None:
    space = space_of(PLAN)
    assert [trial.gene for trial in walk(PLAN, 3)] == list(space.alone())


def test_the_second_round_is_half_beside_the_best() -> None:
    trials = walk(PLAN, 6 + 3 + 2 + 6)
    space = space_of(PLAN)
    tried = {trial.gene for trial in trials[:11]}
    beside = {gene for known in tried for gene in space.neighbours(known)}
    assert sum(trial.gene in beside for trial in trials[11:]) >= 3


def test_the_same_seed_gives_the_same_order_and_another_seed_another() -> None:
    assert walk(PLAN, 30) == walk(PLAN, 30)
    assert walk(PLAN, 30) != walk(msgspec.structs.replace(PLAN, seed=8), 30)


@pytest.mark.parametrize("stopped", [1, 7, 20])
def test_a_search_that_is_told_what_is_known_goes_on_where_it_stood(stopped: int) -> None:
    whole, space = walk(PLAN, 30), space_of(PLAN)
    known = {trial: quality(space, trial) for trial in whole[:stopped]}
    exploration, answer, again = explore(space), None, []
    for _ in range(stopped + 5):
        trial = exploration.send(answer)
        again.append(trial)
        answer = known[trial] if trial in known else quality(space, trial)
    assert again == whole[: stopped + 5]


def test_those_that_may_still_pass_come_first() -> None:
    outcomes: dict[Gene, Outcome] = {
        (0,): Outcome(0.5, 0.1, 0.1, hopeful=False),
        (1,): Outcome(0.99, 0.9, 0.9, hopeful=True),
        (2,): Outcome(0.7, 0.2, 0.2, hopeful=False),
    }
    assert promoted(outcomes) == [(1,), (0,)]
    assert promoted({}) == []


def test_int8_is_not_beaten_by_what_it_was_made_of() -> None:
    outcomes: dict[Gene, Outcome] = {
        (0,): Outcome(0.99, 0.5, 0.5, hopeful=True),
        (1,): Outcome(0.98, 0.6, 0.6, hopeful=True),
        (2,): Outcome(0.97, 0.7, 0.7, hopeful=True),
        (3,): Outcome(0.985, 0.5, 0.5, hopeful=True, floats=0.1),
    }
    assert set(promoted(outcomes)) == {(0,), (3,)}


def test_with_int8_the_order_is_repeatable_too() -> None:
    plan = msgspec.structs.replace(PLAN, vary={"quantize": (False, {})})
    trials = walk(plan, 40)
    assert trials == walk(plan, 40)
    space = space_of(plan)
    assert [trial.gene for trial in trials[:4]] == list(space.alone())
    assert space.recipe(trials[3].gene, 1).quantize is not None


def test_a_round_in_which_nothing_could_be_done_does_not_end_the_search() -> None:
    exploration = explore(space_of(PLAN))
    trials = [exploration.send(None) for _ in range(12)]
    assert all(trial.epochs == 1 for trial in trials)
    assert len({trial.gene for trial in trials}) == 12
