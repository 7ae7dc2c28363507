"""A plan's file: what was written is read, and what was altered is refused."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.errors import ConfigError
from rankd.plan.cost_model import CostModel
from rankd.plan.declaration import Declaration, Net, loads_of
from rankd.plan.plan_file import read_plan, write_plan
from rankd.plan.prediction import predict
from rankd.plan.strategies import make_plan
from rankd.plan.table_plan import MemoryLimits, Strategy
from rankd.plan.table_statistics import TableLoad
from tests.plan.made_up import load_of, some_limits, some_loads


def declared(loads: list[TableLoad]) -> Declaration:
    nets = dict.fromkeys(load.net for load in loads)
    return Declaration(
        "made up",
        tuple(load.spec for load in loads),
        tuple(Net(net, tuple(load.name for load in loads if load.net == net)) for net in nets),
        tuple(load.statistics for load in loads),
    )


@given(some_loads(), st.sampled_from(Strategy), st.integers(1, 6), some_limits, st.floats(1, 10_000))
def test_a_plan_is_read_as_it_was_written(
    loads: list[TableLoad], strategy: Strategy, num_shards: int, limits: MemoryLimits, rate: float
) -> None:
    try:
        plan = make_plan(strategy, loads, num_shards, limits)
    except ConfigError:
        return
    declaration = declared(loads)
    assert list(loads_of(declaration)) == loads
    prediction = predict(plan, loads, CostModel(rate=rate))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        write_plan(path, declaration, plan, prediction)
        found = read_plan(path)
    assert (found.model, found.nets, found.plan, found.prediction) == (
        "made up", declaration.nets, plan, prediction
    )  # fmt: skip


def change(document: dict[str, Any], path: tuple[str | int, ...], value: object) -> None:
    at: Any = document
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), 2, "has format 2, and this rankd reads 1"),
        (("stategy",), "x", "unknown key 'stategy'"),
        (("plan", "strategy"), "auto", r"\$.plan.strategy"),
        (("plan", "shrads"), [], "Did you mean 'shards'"),
        (("plan", "shards", 0, "parts", 0, "table"), "c", "shard 0: there is no table 'c'"),
        (("plan", "shards", 0, "parts", 0, "remainder"), 1, "remainder 1 of table 'a' is in shard 0"),
        (("plan", "shards", 0, "parts", 0, "modulus"), 3, "one modulus"),
        (("plan", "shards", 0, "parts"), [], "nobody has"),
        (("plan", "limits", "shard_bytes"), 100, "100 B"),
        (("plan", "tables", 0, "rows"), 0, r"rows"),
        (("nets", 0, "tables", 0), "c", "there is no table 'c'"),
        (("prediction", "shards"), [], "2 shards, and a prediction of 0"),
    ],
)
def test_what_was_altered_is_refused(tmp_path: Path, path: tuple[str | int, ...], value: object, message: str) -> None:
    loads = [load_of("a", 100, net="x"), load_of("b", 50, net="y")]
    plan = make_plan(Strategy.CAPACITY_BALANCED, loads, 2, MemoryLimits(replicate_bytes=0))
    file = tmp_path / "plan.json"
    write_plan(file, declared(loads), plan, predict(plan, loads, CostModel()))
    document = json.loads(file.read_text())
    change(document, path, value)
    file.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=message):
        read_plan(file)


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    with pytest.raises(ConfigError, match="No such file"):
        read_plan(file)
    for text, message in (("{", "not valid JSON"), ("[]", "one JSON object"), ("{}", "missing required field")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_plan(file)
    with pytest.raises(ConfigError, match="cannot be written"):
        write_plan(tmp_path / "no" / "plan.json", declared([load_of("a", 1)]), make_plan(
            Strategy.SINGULAR, [load_of("a", 1)], 1, MemoryLimits()
        ))  # fmt: skip
