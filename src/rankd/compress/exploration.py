"""In which order a search tries recipes. A pure policy: it yields a trial, is sent what came of it, yields the next.

Recipes come in rounds of `width`. All are tuned for a few epochs, the better half for twice as many, and so on
(successive halving, Jamieson and Talwalkar 2016). The first round has each step alone, so that it is known what each
can do; later ones are half neighbours of the best found so far, half drawn anew. What is compared does not depend on
how fast the machine is (quality, operations, parameters, what is left in floats), so that the same seed gives the same
order, and a search that was interrupted is repeated up to where it stood by sending it what is known.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Mapping
from typing import NamedTuple

import numpy as np

from rankd.compress.pareto import front, ranked
from rankd.compress.search_plan import Gene, RecipeSpace


class Trial(NamedTuple):
    """A recipe and for how many epochs it is tuned."""

    gene: Gene
    epochs: int


class Outcome(NamedTuple):
    """What a recipe came to. `hopeful`: no bound lies above the whole interval of its metric. `floats` is the share of
    the layers that compute in floats: all of them, but in int8."""

    accuracy: float
    flops: float
    parameters: float
    hopeful: bool
    floats: float = 1.0


Exploration = Generator[Trial, Outcome | None, None]
"""Sent None for a recipe that could not be done."""


def explore(space: RecipeSpace) -> Exploration:
    """Every recipe of the space, the promising ones for longer; it ends when there is no other recipe."""
    plan, random = space.plan, np.random.default_rng(space.plan.seed)
    genes = space.genes()
    waiting = [genes[place] for place in random.permutation(len(genes))]
    best: dict[Gene, Outcome] = {}
    entrants = list(dict.fromkeys(space.alone()))
    while waiting:
        entrants = [*entrants, *(gene for gene in waiting if gene not in entrants)][: max(plan.width, 1)]
        waiting = [gene for gene in waiting if gene not in entrants]
        running = entrants
        for epochs in plan.rungs():
            outcomes: dict[Gene, Outcome] = {}
            for gene in running:
                outcome = yield Trial(gene, epochs)
                if outcome is not None:
                    outcomes[gene] = outcome
            best |= outcomes
            running = promoted(outcomes)
        entrants = _beside_the_best(space, best, waiting, random)


def promoted(outcomes: Mapping[Gene, Outcome]) -> list[Gene]:
    """The better half: those that may still pass first, then by Pareto fronts."""
    chosen: list[Gene] = []
    for hopeful in (True, False):
        genes = [gene for gene, outcome in outcomes.items() if outcome.hopeful is hopeful]
        if genes:
            chosen += [genes[place] for place in ranked(np.asarray([_costs(outcomes[gene]) for gene in genes]))]
    return chosen[: -(-len(outcomes) // 2)]


def _beside_the_best(
    space: RecipeSpace, best: Mapping[Gene, Outcome], waiting: list[Gene], random: np.random.Generator
) -> list[Gene]:
    """Half a round of recipes that differ in one thing from one of the front, taken in turn from each of it."""
    genes = [gene for gene, outcome in best.items() if outcome.hopeful] or list(best)
    if not genes:
        return []
    parents = [genes[place] for place in front(np.asarray([_costs(best[gene]) for gene in genes]))]
    free = set(waiting)
    beside = [[one for one in space.neighbours(parent) if one in free] for parent in parents]
    drawn = [[ones[place] for place in random.permutation(len(ones))] for ones in beside]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*drawn))
    return list(dict.fromkeys(gene for gene in turns if gene is not None))[: space.plan.width // 2]


def _costs(outcome: Outcome) -> tuple[float, float, float, float]:
    return -outcome.accuracy, outcome.flops, outcome.parameters, outcome.floats
