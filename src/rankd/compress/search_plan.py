"""The plan of a search, a TOML file: which recipes there are, how they are tuned, measured and judged.

Recipes are data: a step with the values that its settings may take, and settings of any other part of a recipe. One
more dimension is one more line or table. In: a plan. Out: `RecipeSpace`; next: `exploration.py` says in which order it
is tried.

    [[steps]]                           two values of flops, two criteria, or no pruning at all: 5 combinations
    kind = "prune"
    optional = true
    settings = { requests = 256 }
    vary = { flops = [0.7, 0.5], criterion = ["taylor", "magnitude"] }

    [vary]                              times two; a part of a recipe as a whole may vary too, `false` leaves it out
    "finetune.learning_rate" = [3e-4, 1e-3]
    quantize = [false, {}]              and again: each in floats and in int8, and int8 alone
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from rankd.compress.compression_recipe import (
    CompressionRecipe,
    Count,
    FineTuning,
    Gate,
    Positive,
    ReferenceRequest,
    Seed,
    check_recipe,
)
from rankd.config import convert, read_struct
from rankd.errors import ConfigError, nearest

MOST_RECIPES = 100_000
PARTS = tuple(name for name in CompressionRecipe.__struct_fields__ if name not in ("steps", "gate"))
"""Of a recipe, which may vary."""
QUANTIZE = "quantize"
"""The part that a recipe may do without, and that may be all that it does."""
Values = Annotated[tuple[Any, ...], Meta(min_length=1)]
Gene = tuple[int, ...]
"""A recipe: for each dimension of the space the number of its value."""


class StepSpace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A step of recipes: `settings` that it always has, and for each of `vary` the values that it may have."""

    kind: str
    optional: bool = False
    settings: dict[str, Any] = {}
    vary: dict[str, Values] = {}


class Timing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a model is timed: on `requests` of the choosing days, the best of `rounds` calls of each, and twice for
    `throughput_s` seconds cold and warm on all executors."""

    requests: Count = 100
    rounds: Count = 3
    throughput_s: Positive = 0.4


class SearchPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file.

    Recipes are tried `width` at a time: all are tuned for a part of `finetune.epochs`, the better half for twice as
    long, `halvings` times, until the best have had all epochs. `vary` are values of other settings of a recipe, by
    their dotted names. What is found is chosen on the gate's days before `choose_until` (a date, UTC; left out: the
    day in their middle) and judged once on the rest. `accuracy` is the metric of `gate.bounds` that is drawn, and kept.
    """

    steps: tuple[StepSpace, ...] = ()
    vary: dict[str, Values] = {}
    width: Count = 8
    halvings: Annotated[int, Meta(ge=0, le=6)] = 2
    seed: Seed = 7
    choose_until: str = ""
    accuracy: str = "ndcg@10"
    request: ReferenceRequest = ReferenceRequest()
    timing: Timing = Timing()
    finetune: FineTuning = FineTuning(epochs=4)
    gate: Gate = Gate()

    def rungs(self) -> tuple[int, ...]:
        """Epochs of fine-tuning: of all, of the better half, of the best."""
        epochs = self.finetune.epochs
        return tuple(sorted({max(epochs >> times, min(epochs, 1)) for times in range(self.halvings + 1)}))


@dataclass(frozen=True, slots=True)
class Dimension:
    """A setting and its values. `step` is the step's number, or None for another part of the recipe.

    `setting` "" is whether the step is taken, 0 or 1; a value False of a whole part leaves that out.
    """

    step: int | None
    setting: str
    values: tuple[Any, ...]

    @property
    def is_of_int8(self) -> bool:
        """Whether it is `quantize`, or a setting of it."""
        return self.step is None and self.setting.partition(".")[0] == QUANTIZE

    @property
    def first_taken(self) -> int:
        """The number of the first value that does not leave it out; 0 if all do."""
        return next((number for number, value in enumerate(self.values) if value is not False), 0)


@dataclass(frozen=True, slots=True)
class RecipeSpace:
    """All recipes of a plan."""

    plan: SearchPlan
    dimensions: tuple[Dimension, ...]

    def has_int8(self) -> bool:
        """Whether a recipe of it can end in int8."""
        return any(one.is_of_int8 for one in self.dimensions)

    def genes(self) -> list[Gene]:
        """Every recipe that does something once; settings of what is left out are those of its first value."""
        every = itertools.product(*(range(len(one.values)) for one in self.dimensions))
        return sorted({gene for gene in map(self.plain, every) if self.does_something(gene)})

    def plain(self, gene: Gene) -> Gene:
        """The same recipe, with the first value wherever the value does not matter."""
        taken, int8 = self._taken(gene), self._quantizes(gene)

        def matters(one: Dimension) -> bool:
            if one.step is None:
                return int8 or not one.is_of_int8 or one.setting == QUANTIZE
            return not one.setting or one.step in taken

        return tuple(value if matters(one) else 0 for one, value in zip(self.dimensions, gene, strict=True))

    def alone(self) -> Iterator[Gene]:
        """For each step the recipe that takes it with middle values, and nothing optional beside it; then int8 so."""
        for wanted in range(len(self.plan.steps)):
            gene = (len(one.values) // 2 if one.step == wanted else 0 for one in self.dimensions)
            yield self.plain(tuple(gene))
        int8 = tuple(one.first_taken if one.setting == QUANTIZE else 0 for one in self.dimensions)
        if self._quantizes(int8):
            yield self.plain(int8)

    def neighbours(self, gene: Gene) -> list[Gene]:
        """The recipes that differ in one dimension."""
        changed = (
            self.plain((*gene[:place], value, *gene[place + 1 :]))
            for place, one in enumerate(self.dimensions)
            for value in range(len(one.values))
        )
        return sorted({other for other in changed if self.does_something(other)} - {gene})

    def recipe(self, gene: Gene, epochs: int) -> CompressionRecipe:
        """The recipe as `rankd compress --recipe` takes it. Without steps there is nothing to tune for `epochs`."""
        plan, taken, int8 = self.plan, self._taken(gene), self._quantizes(gene)
        steps: list[dict[str, Any]] = [{"kind": step.kind, **step.settings} for step in plan.steps]
        document: dict[str, Any] = {
            "request": msgspec.to_builtins(plan.request),
            "finetune": {**msgspec.to_builtins(plan.finetune), "epochs": epochs if taken else 0},
            "gate": msgspec.to_builtins(plan.gate),
        }
        for one, number in zip(self.dimensions, gene, strict=True):
            value = copy.deepcopy(one.values[number])
            if one.step is None:
                part, _, setting = one.setting.partition(".")
                if value is False or (one.is_of_int8 and not int8):
                    continue
                if setting:
                    document.setdefault(part, {})[setting] = value
                else:
                    document[part] = value
            elif one.setting:
                steps[one.step][one.setting] = value
        document["steps"] = [step for number, step in enumerate(steps) if number in taken]
        recipe = convert(document, CompressionRecipe, "a recipe of the search")
        check_recipe(recipe)
        return recipe

    def label(self, gene: Gene) -> str:
        """What a recipe is called: its steps and int8, with the settings that others have otherwise."""
        taken, int8 = self._taken(gene), self._quantizes(gene)
        parts = {number: [self.plan.steps[number].kind] for number in taken}
        rest, narrow = list[str](), ["int8"] if int8 else []
        for one, number in zip(self.dimensions, gene, strict=True):
            value = one.values[number]
            if len(one.values) == 1 or not one.setting:
                continue
            if one.step is not None:
                if one.step in taken:
                    parts[one.step].append(_short(value))
            elif value is not False and (int8 or not one.is_of_int8):
                name = "" if one.setting == QUANTIZE else one.setting.rpartition(".")[2]
                (narrow if one.is_of_int8 else rest).append(f"{name} {_short(value)}".strip())
        words = [" ".join(parts[number]) for number in sorted(parts)] + rest + [" ".join(filter(None, narrow))]
        return " + ".join(filter(None, words))

    def _taken(self, gene: Gene) -> set[int]:
        """The steps that are taken."""
        optional = {one.step: value for one, value in zip(self.dimensions, gene, strict=True) if not one.setting}
        return {number for number in range(len(self.plan.steps)) if optional.get(number, 1)}

    def _quantizes(self, gene: Gene) -> bool:
        """Whether it ends in int8."""
        values = {
            one.setting: one.values[number] for one, number in zip(self.dimensions, gene, strict=True) if one.is_of_int8
        }
        return bool(values) and values.get(QUANTIZE) is not False

    def does_something(self, gene: Gene) -> bool:
        """Whether it has a step, or int8."""
        return bool(self._taken(gene)) or self._quantizes(gene)


def space_of(plan: SearchPlan) -> RecipeSpace:
    """The space of a plan, with every value of it tried in a recipe.

    Raises:
        ConfigError: a value that no recipe takes, too many recipes or none, an accuracy that is not judged.
    """
    dimensions = []
    for number, step in enumerate(plan.steps):
        if step.optional:
            dimensions.append(Dimension(number, "", (0, 1)))
        dimensions += [Dimension(number, setting, tuple(values)) for setting, values in step.vary.items()]
    for setting, values in sorted(plan.vary.items(), key=lambda item: "." in item[0]):  # parts before their settings
        if setting.partition(".")[0] not in PARTS or setting in ("finetune", "finetune.epochs"):
            raise ConfigError(
                f"vary.'{setting}': give a part of a recipe or a setting of one, PART or PART.NAME, with PART of "
                f"{', '.join(PARTS)}; epochs are the search's own, and what belongs to a step varies there"
            )
        dimensions.append(Dimension(None, setting, tuple(values)))
    space = RecipeSpace(plan, tuple(dimensions))
    size = math.prod(len(one.values) for one in dimensions)
    if size > MOST_RECIPES:
        raise ConfigError(f"the plan has {size:,} combinations, allowed are {MOST_RECIPES:,}; leave out values")
    if plan.accuracy not in plan.gate.bounds:
        raise ConfigError(
            f"accuracy '{plan.accuracy}' has no bound; gate.bounds has: {', '.join(plan.gate.bounds)}."
            f"{nearest(plan.accuracy, plan.gate.bounds)}"
        )
    _try_values(space)
    return space


def packaged_plan(kind: str) -> SearchPlan:
    """The plan that comes with the package for a kind of model.

    Raises:
        ConfigError: there is none.
    """
    packaged = resources.files("rankd.compress").joinpath("spaces", f"{kind}.toml")
    if not packaged.is_file():
        raise ConfigError(f"there is no packaged plan for a '{kind}'; climber and sasrec can be compressed")
    with resources.as_file(packaged) as found:
        return read_struct(SearchPlan, found)


def _try_values(space: RecipeSpace) -> None:
    """Make a recipe of all steps, and int8, with each value of each setting."""
    whole = tuple((one.first_taken if one.step is None else 0) if one.setting else 1 for one in space.dimensions)
    space.recipe(whole, space.plan.finetune.epochs)
    for place, one in enumerate(space.dimensions):
        for value in range(len(one.values)) if one.setting else ():
            gene = (*whole[:place], value, *whole[place + 1 :])
            if space.does_something(gene):
                space.recipe(gene, space.plan.finetune.epochs)


def _short(value: Any) -> str:
    """A value in a label."""
    if isinstance(value, dict):
        return " ".join(f"{name} {_short(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return "/".join(map(_short, value))
    return str(value)
