"""Files of costs: what is written is read, and what cannot be is refused before it costs anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.embeddings.table_spec import TableSpec, TableStorage
from rankd.errors import ConfigError
from rankd.plan.cost_model import CostModel, LookupCost
from rankd.plan.costs_file import check_costs_path, read_costs, write_costs

amounts = st.floats(0, 1e9)
some_costs = st.builds(
    CostModel,
    call_us=amounts,
    id_us=amounts,
    lookups=st.dictionaries(st.sampled_from(TableStorage), st.builds(LookupCost, amounts, amounts)),
    wire_bytes_us=st.floats(1e-9, 1e9),
    machine_cores=st.none() | st.integers(1, 9),
    samples=st.lists(st.integers(1, 1000), min_size=1, max_size=5).map(tuple),
)


@given(some_costs, st.sampled_from(["costs.toml", "costs.json"]))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, costs: CostModel, name: str) -> None:
    path = tmp_path_factory.mktemp("costs") / name
    write_costs(path, costs, ["of a machine"])
    assert read_costs(path) == costs


def test_notes_stand_above_and_what_is_left_out_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "costs.toml"
    write_costs(path, CostModel(call_us=7.5), ["of a machine", "in a test"])
    assert path.read_text().startswith("# of a machine\n# in a test\ncall_us = 7.5\n")
    path.write_text("[lookups.int8]\nrow_us = 1.0\n")
    costs = read_costs(path)
    assert costs.call_us == CostModel().call_us
    assert costs.row_us(TableSpec("a", 1, 92, TableStorage.INT8)) == pytest.approx(1.0 + 100 * LookupCost().byte_us)
    assert costs.row_us(TableSpec("a", 1, 25)) == pytest.approx(LookupCost().row_us + 100 * LookupCost().byte_us)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cal_us = 1", "unknown key 'cal_us'.* Did you mean 'call_us'"),
        ("call_us = -1", "call_us"),
        ("samples = []", "samples"),
        ("main_cores = 0", "main_cores"),
        ("[lookups.fp31]", "fp31"),
        ("[lookups.fp32]\nrow = 1", "row"),
    ],
)
def test_bad_costs_are_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "costs.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_costs(path)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends in .toml or .json"):
        check_costs_path(tmp_path / "costs.yaml")
    with pytest.raises(ConfigError, match="in a folder that is there"):
        check_costs_path(tmp_path / "away" / "costs.toml")
    (tmp_path / "taken.toml").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        write_costs(tmp_path / "taken.toml", CostModel())
