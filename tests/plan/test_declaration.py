"""Declarations: files, packaged models, and what does not fit together."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from rankd.embeddings.table_spec import TableStorage
from rankd.errors import ConfigError
from rankd.plan.declaration import Declaration, loads_of, read_declaration
from rankd.plan.table_statistics import TableStatistics

GOOD = """
name = "shop"
[[tables]]
name = "user"
rows = 100
dim = 8
storage = "int8"
[[tables]]
name = "item"
rows = 10
dim = 4
[[nets]]
name = "who"
tables = ["user"]
[[nets]]
name = "what"
tables = ["item"]
[[statistics]]
table = "item"
lookups = 3
"""


def read(folder: Path, text: str, name: str = "tables.toml") -> Declaration:
    path = folder / name
    path.write_text(text)
    return read_declaration(str(path))


def test_a_file_is_read_and_joined(tmp_path: Path) -> None:
    user, item = loads_of(read(tmp_path, GOOD), [TableStatistics("user", lookups=5.0)])
    assert (user.net, user.spec.storage, user.statistics.lookups) == ("who", TableStorage.INT8, 5.0)
    assert (item.net, item.spec.storage, item.statistics.lookups) == ("what", TableStorage.FP32, 3.0)


def test_what_the_page_shows_can_be_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    block = page[page.index('    name = "shop"') : page.index("## Statistics")]
    (load,) = loads_of(read(tmp_path, textwrap.dedent(block)))
    assert (load.name, load.net, load.spec.storage) == ("user", "who", TableStorage.INT8)


def test_given_statistics_go_before_the_declared_ones(tmp_path: Path) -> None:
    _, item = loads_of(read(tmp_path, GOOD), [TableStatistics("item", lookups=9.0)])
    assert item.statistics.lookups == 9.0


def test_json_is_read_too(tmp_path: Path) -> None:
    found = read(tmp_path, '{"name": "m", "tables": [{"name": "a", "rows": 3, "dim": 2}]}', "tables.json")
    (load,) = loads_of(found)
    assert (load.net, load.statistics) == ("all", TableStatistics("a"))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("dim = 4", "dims = 4", "Did you mean 'dim'"),
        ("rows = 10\n", "rows = 0\n", "rows"),
        ('name = "item"', 'name = "user"', "'user' is there twice"),
        ('tables = ["item"]', 'tables = ["items"]', "Did you mean 'item'"),
        ('tables = ["item"]', 'tables = ["user"]', "'user' is there twice"),
        ('tables = ["item"]', "tables = []", "item are in no net"),
        ('name = "what"', 'name = "who"', "'who' is there twice"),
        ('table = "item"', 'table = "itme"', "Did you mean 'item'"),
        ("lookups = 3", "lookups = -3", "lookups"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert before in GOOD
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, GOOD.replace(before, after))


def test_no_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tables"):
        read(tmp_path, 'name = "m"\ntables = []\n')


def test_dlrm_v2_is_as_published() -> None:
    loads = loads_of(read_declaration("dlrm-v2"))
    assert len(loads) == 26
    assert sum(load.statistics.lookups for load in loads) == 214
    assert sum(load.spec.size_bytes for load in loads) == pytest.approx(104.5e9, rel=0.001)
    large = [load for load in loads if load.spec.rows == 40_000_000]
    assert sum(load.statistics.lookups for load in large) == 149


def test_rows_are_scaled() -> None:
    whole, part, more = (read_declaration(name).tables for name in ("dlrm-v2", "dlrm-v2/20", "dlrm-v2x10"))
    assert [table.rows for table in part] == [-(-table.rows // 20) for table in whole]
    assert [table.rows for table in more] == [table.rows * 10 for table in whole]
    assert min(table.rows for table in part) == 1


@pytest.mark.parametrize("name", ["dlrm-v3", "dlrm-v2/0", "dlrm-v2/", "dlrm-v2x", "nowhere.toml"])
def test_an_unknown_model_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"packaged models are dlrm-v2"):
        read_declaration(name)
