"""Embedded features: candidates that are listed more than once, and how long look-ups are said to take."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.pooling import LookUp
from rankd.features.embedded import EmbeddedInputs
from rankd.features.schema import EmbeddedFeature, EmbeddedSide
from rankd.types import Array, Float32Array
from tests.embeddings.still_source import StillSource
from tests.features.sample_schema import make_schema

WIDTHS = {"item": 3, "shop": 2}


class Noted(StillSource):
    """A `TableSource` whose sums are those of the ids themselves; notes what was asked."""

    local = True

    def __init__(self) -> None:
        self.asked: list[JaggedIds] = []

    def begin(self, asked: Sequence[JaggedIds], into: Sequence[Float32Array], deadline: float | None = None) -> LookUp:
        self.asked += asked
        for one, out in zip(asked, into, strict=True):
            begin, samples = 0, one.num_samples
            for table, name in enumerate(one.tables):
                for sample in range(samples):
                    ids = one.ids[one.offsets[table * samples + sample] : one.offsets[table * samples + sample + 1]]
                    out[sample, begin : begin + WIDTHS[name]] = ids.sum()
                begin += WIDTHS[name]
        return Done()

    def close(self) -> None:
        pass


class Done:
    """A look-up that is there."""

    def there(self) -> bool:
        return True

    def when_there(self, then: Callable[[], None]) -> None:
        then()

    def finish(self) -> tuple[str, ...]:
        return ("shop", "item", "shop")

    def forget(self) -> None:
        pass


EMBEDDED = msgspec.structs.replace(
    make_schema(),
    embedded=(
        EmbeddedFeature("item", 3, EmbeddedSide.ITEM),
        EmbeddedFeature("shop", 2, EmbeddedSide.ITEM_COLUMN, 0),
    ),
)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_a_candidate_that_is_listed_twice_is_looked_up_once(rows: list[int]) -> None:
    tables = Noted()
    inputs = EmbeddedInputs(EMBEDDED, tables)
    first = EMBEDDED.item_categorical[0].offset
    width = sum(column.width for column in EMBEDDED.item_categorical)
    codes = np.zeros((1, len(rows), width), np.int32)
    codes[0, :, 0] = [first + row % 3 if row else 0 for row in rows]
    into: dict[str, Array] = {
        "candidate_item": np.asarray([rows], np.int32),
        "candidate_categories": codes,
        "candidate_embedded": np.full((1, len(rows), 5), np.nan, np.float32),
    }
    looking = inputs.begin(into, {})
    assert looking.finish() == ("shop", "item")
    shops = [row % 3 + 1 if row else 0 for row in rows]
    expected = [[row] * 3 + [shop] * 2 for row, shop in zip(rows, shops, strict=True)]
    assert into["candidate_embedded"][0].tolist() == expected
    (asked,) = tables.asked
    assert asked.num_samples == len(set(rows))
    figures = inputs.figures()
    assert (figures.lookups, figures.seconds >= 0.0) == (1, True)
