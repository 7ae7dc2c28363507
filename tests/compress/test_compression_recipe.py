"""A recipe is read whole or refused with the path of what is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rankd.compress.compression_recipe import (
    CompressionRecipe,
    Criterion,
    Prune,
    Quantize,
    QuantizedTuning,
    ShareLayers,
    Structure,
    check_recipe,
)
from rankd.compress.search_plan import SearchPlan, space_of
from rankd.config import read_struct
from rankd.errors import ConfigError

PRUNE = '[[steps]]\nkind = "prune"\n'


def read(tmp_path: Path, text: str) -> CompressionRecipe:
    (tmp_path / "recipe.toml").write_text(text)
    recipe = read_struct(CompressionRecipe, tmp_path / "recipe.toml")
    check_recipe(recipe)
    return recipe


def test_steps_keep_their_order_and_what_is_left_out_has_defaults(tmp_path: Path) -> None:
    recipe = read(tmp_path, PRUNE + 'flops = 0.5\nstructures = ["heads", "ffn"]\n[[steps]]\nkind = "share"\n')
    first, second = recipe.steps
    assert isinstance(first, Prune)
    assert first.structures == (Structure.HEADS, Structure.FFN)
    assert first.criterion is Criterion.TAYLOR
    assert isinstance(second, ShareLayers)
    assert recipe.gate.bounds == {"ndcg@10": 0.99, "gauc": 0.999, "ne": 0.99}


def test_the_recipes_of_the_docs_are_recipes(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "compression.md").read_text()
    texts = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    half, quick, int8, tuned, fifth = (read(tmp_path, text) for text in texts if "vary" not in text)
    assert [type(step) for step in (*half.steps, *quick.steps)] == [Prune, Prune]
    assert quick.request.encodes == 0.3
    assert int8.steps == ()
    assert int8.quantize == Quantize()
    assert tuned.quantize == Quantize(max_error=1.0, finetune=QuantizedTuning())
    assert fifth.quantize == Quantize()
    assert fifth.finetune.epochs == 4


def test_the_plans_of_the_docs_are_plans(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "compression.md").read_text()
    (text,) = (text for text in re.findall(r"```toml\n(.*?)```", page, re.DOTALL) if "vary" in text)
    (tmp_path / "plan.toml").write_text(text)
    space = space_of(read_struct(SearchPlan, tmp_path / "plan.toml"))
    assert len(space.genes()) == 2 * (2 * (6 + 1) * (2 + 1) - 1)  # and int8 alone
    assert space.plan.rungs() == (1, 2, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the recipe does nothing"),
        ("steps = []", "the recipe does nothing"),
        (PRUNE, "one of flops = SHARE and predicted_ms"),
        (PRUNE + "flops = 0.5\npredicted_ms = 2.0", "one of flops = SHARE and predicted_ms"),
        (PRUNE + "flops = 0.0", r"> 0.0.*steps\[0\].flops"),
        (PRUNE + "flops = 1.0", r"< 1.0.*steps\[0\].flops"),
        (PRUNE + "predicted_ms = -1.0", r"steps\[0\].predicted_ms"),
        (PRUNE + "flops = 0.5\nstructures = []", r"steps\[0\].structures"),
        (PRUNE + 'flops = 0.5\nstructures = ["head"]', "head"),
        (PRUNE + 'flops = 0.5\ncriterion = "taylr"', "taylr"),
        (PRUNE + "flops = 0.5\nflop = 1", "flop"),
        ('[[steps]]\nkind = "prun"\nflops = 0.5', "prun"),
        ('[[steps]]\nkind = "student"\noptions = {}', r"steps\[0\].options"),
        ('[[steps]]\nkind = "share"\n[gate]\nmin_user = 3', "Did you mean 'min_users'"),
        ('[[steps]]\nkind = "share"\n[gate]\nmin_users = 3', "gate.min_users"),
        ('[[steps]]\nkind = "share"\n[gate.bounds]\nndcg = 0.9', "no metric 'ndcg'.*Did you mean 'ndcg@10'"),
        ('[[steps]]\nkind = "share"\n[finetune]\nlabels = 0.0\nlogits = 0.0\nranks = 0.0', "all 0"),
        ('[[steps]]\nkind = "share"\n[request]\nprecision = "auto"', "say fp32 or bf16"),
        ('[[steps]]\nkind = "share"\n[request]\nprecision = "int8"', "say fp32 or bf16"),
        ("[quantize]\nrequests = 32", "fewer than min_requests = 64 are refused"),
        ("[quantize]\nmax_error = 0.0", "quantize.max_error"),
        ("[quantize]\nrequest = 100", "Did you mean 'requests'"),
        ("[quantize.finetune]\nepochs = 0", "quantize.finetune.epochs"),
        ("[quantize.finetune]\n[finetune]\nepochs = 0\nlabels = 0.0\nlogits = 0.0\nranks = 0.0", "all 0"),
    ],
)
def test_a_wrong_recipe_says_where_and_what(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)
