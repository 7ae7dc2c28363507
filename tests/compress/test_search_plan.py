"""Recipes are data: what a plan spans, what it calls them, and what is wrong with it by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankd.compress.compression_recipe import Criterion, Factorise, Prune, Quantize, ShareLayers
from rankd.compress.search_plan import RecipeSpace, SearchPlan, packaged_plan, space_of
from rankd.config import read_struct
from rankd.errors import ConfigError

PLAN = """
[[steps]]
kind = "prune"
optional = true
settings = { requests = 64 }
vary = { flops = [0.7, 0.5], criterion = ["taylor", "magnitude"] }

[[steps]]
kind = "share"
optional = true
"""


def read(tmp_path: Path, text: str) -> SearchPlan:
    (tmp_path / "plan.toml").write_text(text)
    return read_struct(SearchPlan, tmp_path / "plan.toml")


def space(tmp_path: Path, text: str = PLAN) -> RecipeSpace:
    return space_of(read(tmp_path, text))


def test_a_space_has_every_recipe_once_and_none_without_a_step(tmp_path: Path) -> None:
    made = space(tmp_path)
    recipes = [made.recipe(gene, 1) for gene in made.genes()]
    assert len(recipes) == 4 + 1 + 4  # a pruning, sharing alone, both
    assert len(set(map(str, recipes))) == len(recipes)
    assert all(recipe.steps for recipe in recipes)
    assert {len(recipe.steps) for recipe in recipes} == {1, 2}
    assert {made.plain(gene) for gene in made.genes()} == set(made.genes())


def test_each_step_alone_has_its_middle_values(tmp_path: Path) -> None:
    made = space(tmp_path)
    first, second = (made.recipe(gene, 3) for gene in made.alone())
    assert first.steps == (Prune(flops=0.5, criterion=Criterion.MAGNITUDE, requests=64),)
    assert second.steps == (ShareLayers(),)
    assert first.finetune.epochs == 3


def test_one_more_dimension_is_one_more_line(tmp_path: Path) -> None:
    before = space(tmp_path)
    rate = space(tmp_path, PLAN + '[vary]\n"finetune.learning_rate" = [3e-4, 1e-3]\n')
    assert len(rate.genes()) == 2 * len(before.genes())
    assert {rate.recipe(gene, 1).finetune.learning_rate for gene in rate.genes()} == {3e-4, 1e-3}
    step = '[[steps]]\nkind = "factorise"\noptional = true\nvary = { rank = [0.5, 0.25] }\n'
    assert len(space(tmp_path, PLAN + step).genes()) == 3 * (len(before.genes()) + 1) - 1


def test_a_part_of_the_recipe_may_be_left_out_by_false(tmp_path: Path) -> None:
    made = space(tmp_path, PLAN + '[vary]\nrequest = [false, { precision = "bf16" }]\n')
    precisions = [made.recipe(gene, 1).request.precision.value for gene in made.genes()]
    assert precisions.count("bf16") == precisions.count("fp32") == 9


def test_neighbours_differ_in_one_thing(tmp_path: Path) -> None:
    made = space(tmp_path)
    for gene in made.genes():
        beside = made.neighbours(gene)
        assert gene not in beside
        assert beside
        mine = {type(step): step for step in made.recipe(gene, 1).steps}
        for other in beside:
            theirs = {type(step): step for step in made.recipe(other, 1).steps}
            assert sum(mine.get(kind) != theirs.get(kind) for kind in mine | theirs) == 1


def test_labels_say_what_differs(tmp_path: Path) -> None:
    made = space(tmp_path)
    labels = {made.label(gene) for gene in made.genes()}
    assert len(labels) == len(made.genes())
    assert {"share", "prune 0.7 taylor", "prune 0.5 magnitude + share"} <= labels


@pytest.mark.parametrize(
    ("halvings", "epochs", "rungs"), [(2, 4, (1, 2, 4)), (3, 2, (1, 2)), (0, 5, (5,)), (2, 0, (0,))]
)
def test_epochs_grow_to_all_of_them(tmp_path: Path, halvings: int, epochs: int, rungs: tuple[int, ...]) -> None:
    text = f"halvings = {halvings}\n{PLAN}[finetune]\nepochs = {epochs}\n"
    assert read(tmp_path, text).rungs() == rungs


INT8 = "[vary]\nquantize = [false, {}, { max_error = 0.5 }]\n"


def test_int8_is_a_dimension_and_may_be_all_that_is_done(tmp_path: Path) -> None:
    made = space(tmp_path, PLAN + INT8)
    recipes = [made.recipe(gene, 2) for gene in made.genes()]
    assert len(recipes) == 9 + 2 * (9 + 1)
    (alone, wide) = (one for one in recipes if not one.steps)
    assert (alone.quantize, wide.quantize) == (Quantize(), Quantize(max_error=0.5))
    assert {one.finetune.epochs for one in recipes if not one.steps} == {0}  # nothing has changed that could be tuned
    assert {one.finetune.epochs for one in recipes if one.steps} == {2}
    labels = [made.label(gene) for gene in made.genes()]
    assert {"share", "share + int8", "int8", "int8 max_error 0.5", "prune 0.7 taylor + int8"} <= set(labels)
    assert len(set(labels)) == len(labels)
    assert [made.label(gene) for gene in made.alone()][-1] == "int8"
    assert made.has_int8()
    assert not space(tmp_path).has_int8()


def test_a_plan_may_vary_int8_alone(tmp_path: Path) -> None:
    made = space(tmp_path, INT8)
    assert [made.recipe(gene, 4).quantize for gene in made.genes()] == [Quantize(), Quantize(max_error=0.5)]
    assert [made.label(gene) for gene in made.alone()] == ["int8"]
    always = space(tmp_path, '[vary]\n"quantize.max_error" = [0.1, 0.5]\n')
    assert [always.recipe(gene, 1).steps for gene in always.genes()] == [(), ()]
    assert [always.label(gene) for gene in always.genes()] == ["int8 max_error 0.1", "int8 max_error 0.5"]


def test_settings_of_int8_do_not_matter_where_there_is_none(tmp_path: Path) -> None:
    made = space(tmp_path, PLAN + '[vary]\n"quantize.max_error" = [0.1, 0.5]\nquantize = [false, {}]\n')
    assert len(made.genes()) == 9 + 2 * (9 + 1)
    assert {one.quantize for one in (made.recipe(gene, 1) for gene in made.genes())} == {
        None, Quantize(max_error=0.1), Quantize(max_error=0.5),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["climber", "sasrec"])
def test_the_packaged_plans_are_plans(kind: str) -> None:
    made = space_of(packaged_plan(kind))
    genes = made.genes()
    assert len(genes) > 600
    assert sum(made.recipe(gene, 1).quantize is not None for gene in genes[::25]) >= len(genes[::25]) // 3
    assert {type(step) for gene in genes[::25] for step in made.recipe(gene, 1).steps} >= {Prune, Factorise}


def test_other_models_have_no_packaged_plan() -> None:
    with pytest.raises(ConfigError, match="no packaged plan for a 'dlrm'; climber and sasrec"):
        packaged_plan("dlrm")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "steps"),
        ('[[steps]]\nkind = "prun"\n', "prun"),
        ('[[steps]]\nkind = "prune"\n', "one of flops = SHARE"),
        ('[[steps]]\nkind = "prune"\nvary = { flops = [0.5, 1.5] }\n', r"< 1.0"),
        ('[[steps]]\nkind = "prune"\nvary = { flops = [0.5, 0.0] }\n', r"> 0.0"),
        ('[[steps]]\nkind = "prune"\nvary = { flop = [0.5] }\n', "flop"),
        ('[[steps]]\nkind = "prune"\nvary = { flops = [] }\n', "length >= 1"),
        (PLAN + '[vary]\n"finetune.epochs" = [1, 2]\n', "epochs are the search's own"),
        (PLAN + "[vary]\nquantize = [false, { requests = 8 }]\n", "fewer than min_requests = 64"),
        (PLAN + '[vary]\nquantize = [false, {}]\n"quantize.max_eror" = [0.5]\n', "Did you mean 'max_error'"),
        ("[vary]\nquantize = [false]\n", "the recipe does nothing"),
        (PLAN + '[vary]\n"finetun.ranks" = [1.0]\n', "PART of request, finetune"),
        (PLAN + '[vary]\n"finetune.rank" = [1.0]\n', "Did you mean 'ranks'"),
        ('accuracy = "ndcg"\n' + PLAN, "has no bound; .*Did you mean 'ndcg@10'"),
        ("wdith = 3\n" + PLAN, "Did you mean 'width'"),
        (PLAN + f'[vary]\n"finetune.ranks" = {[n / 10 for n in range(8000)]}\n', "128,000 combinations, allowed"),
    ],
)
def test_a_wrong_plan_says_where_and_what(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space(tmp_path, text)
