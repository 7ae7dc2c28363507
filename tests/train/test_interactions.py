"""Reading logs: every row is accounted for, and what does not fit is refused by name."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

import msgspec
import polars as pl
import pytest

from rankd.errors import DataError
from rankd.train.description import Action, Columns, LogDescription, RowRule, Split, TaskRule, ValueColumn
from rankd.train.interactions import ANONYMOUS, read_log
from rankd.train.run import packaged_or_file

ROWS = {
    "who": ["u1", "u1", None, "u2", "u2", "u1", "u2", "u1"],
    "what": ["a", "a", "b", "POST", "c", "a", None, "d"],
    "when": [10, 10, 20, 30, 40, 50, 60, 5],
    "basket": ["1", "1", "2", "3", "3", "C4", "5", "0"],
    "amount": [2, 3, 1, 1, -4, -2, 1, 7],
}
DESCRIPTION = LogDescription(
    name="test",
    columns=Columns(user="who", item="what", time="when", basket="basket"),
    tasks=(TaskRule("bought", ("buy",)),),
    split=Split("1970-01-01", "1970-01-02"),
    default_event="buy",
    event_values=(ValueColumn("amount", "amount"),),
    rows=(
        RowRule("postage", "what", Action.DROP, matches="^POST$"),
        RowRule("returned", "basket", Action.EVENT, matches="^C", event="return"),
        RowRule("not positive", "amount", Action.DROP, below=1),
        RowRule("nobody", "who", Action.ANONYMOUS, missing=True),
    ),
)


def write(folder: Path, name: str = "log.parquet", **columns: list[object]) -> Path:
    path = folder / name
    frame = pl.DataFrame({**ROWS, **columns})
    frame.write_parquet(path) if path.suffix == ".parquet" else frame.write_csv(path)
    return path


@pytest.mark.parametrize("name", ["log.parquet", "log.csv"])
def test_every_row_is_accounted_for(tmp_path: Path, name: str) -> None:
    log = read_log(write(tmp_path, name), DESCRIPTION)
    assert log.report == {
        "rows in the file": 8,
        "dropped: no usable item": 1,
        "drop: postage": 1,
        "event: returned": 1,
        "drop: not positive": 1,
        "anonymous: nobody": 1,
        "merged into another line of its basket": 1,
        "events kept": 4,
        "of these anonymous": 1,
    }
    assert [log.item_ids[row - 2] for row in log.rows] == ["d", "a", "b", "a"]
    assert [log.event_types[event] for event in log.events] == ["buy", "buy", "buy", "return"]
    assert log.times.tolist() == [5, 10, 20, 50]
    assert [ANONYMOUS if user == ANONYMOUS else log.user_ids[user] for user in log.users] == ["u1", "u1", -1, "u1"]
    assert log.values[:, 0].tolist() == [7.0, 5.0, 1.0, -2.0]


@pytest.mark.parametrize(
    "when",
    [
        [datetime(1970, 1, 1, 0, 0, second) for second in (10, 10, 20, 30, 40, 50, 59, 5)],
        [f"1970-01-01 00:00:{second:02}" for second in (10, 10, 20, 30, 40, 50, 59, 5)],
    ],
)
def test_timestamps_and_texts_are_times(tmp_path: Path, when: list[object]) -> None:
    assert read_log(write(tmp_path, when=when), DESCRIPTION).times.tolist() == [5, 10, 20, 50]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    def refused(words: str, path: Path, description: LogDescription = DESCRIPTION) -> None:
        with pytest.raises(DataError, match=words):
            read_log(path, description)

    refused("no such file", tmp_path / "none.parquet")
    refused("unknown format '.json'", tmp_path / "log.json")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    refused("cannot be read", tmp_path / "broken.parquet")
    path = write(tmp_path)
    renamed = msgspec.structs.replace(DESCRIPTION, columns=Columns(user="whom", item="what", time="when"))
    refused("Did you mean 'who'", path, renamed)
    refused("a time is a timestamp", write(tmp_path, "floats.parquet", when=[0.5] * 8))
    other_task = msgspec.structs.replace(DESCRIPTION, tasks=(TaskRule("seen", ("view",)),))
    refused("wants event 'view'", path, other_task)
    two_conditions = RowRule("both", "who", Action.DROP, matches="x", missing=True)
    refused("exactly one of", path, msgspec.structs.replace(DESCRIPTION, rows=(two_conditions,)))
    refused("no event of a known user", write(tmp_path, "anonymous.parquet", who=[None] * 8))


SHARED = Path(__file__).parents[3] / "shared" / "data" / "online_retail_until_2011-08.parquet"


def test_online_retail_adds_up() -> None:
    if not SHARED.exists():
        if os.environ.get("CI"):
            pytest.fail(f"CI has to have {SHARED}")
        pytest.skip("the Online Retail log is not on this machine")
    report = dict(read_log(SHARED, packaged_or_file(LogDescription, "logs", "online-retail")).report)
    assert report["rows in the file"] == 320_705
    assert report["event: cancellation"] == 5_454
    gone = sum(count for name, count in report.items() if name.startswith(("drop", "merged")))
    assert report["events kept"] == 320_705 - gone
