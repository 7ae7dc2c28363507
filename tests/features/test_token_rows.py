"""Rows of a history's tokens: looked up once, from where they are missing, and waited for by nobody."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import msgspec
import numpy as np
import pytest

from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.pooling import LookUp
from rankd.features.assembly import appended_tokens, history_arrays
from rankd.features.embedded import EmbeddedInputs
from rankd.features.schema import EmbeddedFeature, EmbeddedSide
from rankd.features.token_rows import RowsAway, TokenRows
from rankd.types import Array, Float32Array
from tests.embeddings.still_source import StillSource
from tests.features.sample_schema import make_history, make_items, make_schema

SCHEMA = msgspec.structs.replace(
    make_schema(),
    embedded=(
        EmbeddedFeature("item", 2, EmbeddedSide.EVENT_ITEM),
        EmbeddedFeature("item.columns", 1, EmbeddedSide.EVENT_COLUMNS),
    ),
)
ITEMS = make_items()
HISTORY = make_history([5, 6, 5, 9])
WIDTHS = {"item": 2, "item.columns": 1}


class Source(StillSource):
    """Sums of the ids themselves, there when `come` was called; `lost` tables have zeros."""

    def __init__(self, local: bool = False) -> None:
        self.local, self.asked = local, list[JaggedIds]()
        self.lost: tuple[str, ...] = ()
        self.content = "one"
        self._coming: list[Coming] = []

    def begin(self, asked: Sequence[JaggedIds], into: Sequence[Float32Array], deadline: float | None = None) -> LookUp:
        self.asked += asked
        self._coming.append(Coming(self, asked, into))
        if self.local:
            self._coming[-1].come()
        return self._coming[-1]

    def contents(self) -> Mapping[str, str]:
        return {"item": self.content, "item.columns": "always", "user": ""}

    def come(self) -> None:
        for one in self._coming:
            one.come()

    def close(self) -> None:
        pass


class Coming:
    """A look-up of a `Source`."""

    def __init__(self, source: Source, asked: Sequence[JaggedIds], into: Sequence[Float32Array]) -> None:
        self._source, self._asked, self._into = source, asked, into
        self._then, self._came = list[Callable[[], None]](), False

    def come(self) -> None:
        self._came = True
        for then in self._then:
            then()

    def there(self) -> bool:
        return self._came

    def when_there(self, then: Callable[[], None]) -> None:
        self._then.append(then)

    def finish(self) -> tuple[str, ...]:
        for asked, out in zip(self._asked, self._into, strict=True):
            out[...] = sums_of(asked, self._source.lost)
        return self._source.lost

    def forget(self) -> None:
        pass


def sums_of(asked: JaggedIds, lost: tuple[str, ...]) -> Float32Array:
    parts = []
    for table, name in enumerate(asked.tables):
        ends = asked.offsets[table * asked.num_samples : (table + 1) * asked.num_samples + 1]
        sums = [0.0 if name in lost else float(asked.ids[a:b].sum()) for a, b in pairwise(ends)]
        parts.append(np.repeat(np.asarray(sums, np.float32)[:, None], WIDTHS[name], axis=1))
    return np.concatenate(parts, axis=1)


def rows_of(source: Source) -> TokenRows:
    inputs = EmbeddedInputs(SCHEMA, source)
    return TokenRows(inputs, lambda into, history: inputs.begin(into, history))


def tokens() -> dict[str, Array]:
    arrays = history_arrays(SCHEMA, ITEMS, HISTORY)
    arrays["history_embedded"][...] = np.nan  # of the history before
    return arrays


def expected(arrays: Mapping[str, Array]) -> Array:
    rows, codes = arrays["history_item"], arrays["history_categories"].sum(-1)
    return np.stack([rows, rows, codes], axis=-1)


@pytest.mark.parametrize("local", [True, False])
def test_all_tokens_are_looked_up_padding_is_zeros_and_an_item_is_asked_once(local: bool) -> None:
    source, arrays = Source(local), tokens()
    rows = rows_of(source)
    if not local:
        with pytest.raises(RowsAway) as away:
            rows.write(arrays, (0, 0))
        come = list[bool]()
        away.value.when_there(lambda: come.append(True))
        source.come()
        assert come == [True]
        arrays = tokens()  # the executor had another history in between
    assert rows.again(False).write(arrays, (0, 0))
    np.testing.assert_array_equal(arrays["history_embedded"], expected(arrays))
    (asked,) = source.asked
    assert asked.num_samples == len({0, 5, 6, 9})
    assert rows.lost == ()


def test_what_was_asked_early_serves_whoever_needs_as_much_or_less() -> None:
    source, arrays = Source(), tokens()
    rows = rows_of(source)
    lacking = rows.lacking(arrays, (2, 1))
    assert lacking["history_length"].tolist() == [[2, 2]]
    rows.take(lacking, (2, 1), EmbeddedInputs(SCHEMA, source).begin(lacking, lacking))
    source.come()
    for first in ((2, 1), (3, 1), (4, 3)):
        new = appended_tokens(arrays, first, (8,))
        assert rows.write(new, first)
        np.testing.assert_array_equal(new["history_embedded"], expected(new))
    assert len(source.asked) == 1
    with pytest.raises(RowsAway):  # the state that was kept has gone meanwhile
        rows.write(arrays, (0, 0))
    source.come()
    assert rows.write(arrays, (0, 0))
    np.testing.assert_array_equal(arrays["history_embedded"], expected(arrays))
    assert len(source.asked) == 2
    assert rows.lacking(arrays, (4, 3)) == {}


def test_who_tries_for_the_last_time_waits() -> None:
    source, arrays = Source(), tokens()
    assert rows_of(source).again(True).write(arrays, (0, 0))
    np.testing.assert_array_equal(arrays["history_embedded"], expected(arrays))


def test_lost_tables_are_named_and_make_no_state_to_keep() -> None:
    source, arrays = Source(), tokens()
    source.lost = ("item",)
    rows = rows_of(source)
    assert not rows.again(True).write(arrays, (0, 0))
    assert rows.lost == ("item",)
    source.lost = ("user",)
    assert rows_of(source).again(True).write(arrays, (0, 0)), "no token is looked up there"


def test_rows_of_tables_that_were_exchanged_are_asked_again_or_not_kept() -> None:
    source, arrays = Source(), tokens()
    rows = rows_of(source)
    before = rows.contents
    with pytest.raises(RowsAway):
        rows.write(arrays, (0, 0))
    source.come()
    source.content = "two"
    assert not rows.write(arrays, (0, 0)), "which table has answered nobody knows"
    with pytest.raises(RowsAway):
        rows.again(False).write(arrays, (0, 0))
    assert rows.contents not in (before, b"")
    source.come()
    assert rows.again(False).write(arrays, (0, 0))
    assert len(source.asked) == 2
    source.content = ""
    rows = rows_of(source)
    assert rows.contents == b""
    assert not rows.again(True).write(arrays, (0, 0)), "of tables without a fingerprint no state is kept"


@pytest.mark.parametrize("local", [True, False])
def test_of_no_tokens_nothing_is_looked_up(local: bool) -> None:
    source, arrays = Source(local), history_arrays(SCHEMA, ITEMS, make_history([]))
    arrays["history_embedded"][...] = np.nan
    assert rows_of(source).write(arrays, (0, 0))
    assert source.asked == []
    assert not arrays["history_embedded"].any()
