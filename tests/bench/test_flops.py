"""The formula against published figures, and against what torch counts."""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path

import msgspec
import torch
from torch.utils.flop_counter import FlopCounterMode

from rankd.bench.flops import Flops, ModelSizes, climber_flops, head_flops, stack_flops
from rankd.bench.synthetic_model import CLIMBER_DEFAULTS, schema_of
from rankd.bench.workload import load_workload
from rankd.build.export import example
from rankd.features.schema import candidate_specs, history_specs
from rankd.models.climber import Climber


def test_published_figures() -> None:
    """DESIGN.md: 4 layers, d = 256, 4 heads, 512 history tokens, 128 candidates; the head there is one d x d layer."""
    head = 128 * head_flops(256, 256, 1)
    total = stack_flops(ModelSizes(blocks=1, layers=4, width=256), 512, 128) + Flops(head, head, head, head)
    assert round(total.dense / 1e9, 2) == 5.72
    assert round(total.useful / 1e9, 2) == 4.85
    assert round(total.candidates / 1e9, 2) == 1.09


def test_order_of_the_counts() -> None:
    counts = climber_flops(ModelSizes(blocks=2, layers=3, width=256), 256, 128)
    assert counts.dense > counts.useful > counts.needed > counts.candidates > 0


def test_candidates_match_what_torch_counts() -> None:
    """Without numeric features, whose projections the formula leaves out; what is added is a candidate's look at
    itself, which torch does elementwise."""
    workload = load_workload("small")
    sizes = workload.model
    schema = msgspec.structs.replace(schema_of(workload), item_numeric=(), match=())
    model = Climber(schema, width=sizes.width, heads=sizes.heads, layers=sizes.layers, hidden=sizes.hidden).eval()
    tokens, candidates = 50, 20
    history = example(history_specs(schema), B=1, T=tokens, C=candidates)
    given = example(candidate_specs(schema), B=1, T=tokens, C=candidates)
    state = model.encode(history)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.score(state, given)
    itself = sizes.blocks * sizes.layers * candidates * 4 * sizes.width
    assert counter.get_total_flops() + itself == climber_flops(sizes, tokens, candidates).candidates


def test_defaults_are_those_of_the_model() -> None:
    """A manifest does not name the options that were left out."""
    parameters = inspect.signature(Climber).parameters
    assert {name: parameters[name].default for name in CLIMBER_DEFAULTS} == CLIMBER_DEFAULTS


def test_small_is_the_packaged_recipe() -> None:
    recipe = tomllib.loads((Path(__file__).parents[2] / "src/rankd/train/recipes/demo.toml").read_text())
    workload, shapes, options = load_workload("small"), recipe["shapes"], recipe["model"]["options"]
    assert recipe["model"]["kind"] == "climber"
    assert {name: getattr(workload.model, name) for name in options} == options
    assert workload.block_tokens == shapes["history_length"]
    assert list(workload.buckets.history) == shapes["history_buckets"]
    assert list(workload.buckets.candidates) == shapes["candidate_buckets"]
    assert workload.model.blocks == len(shapes["sub_sequences"])
