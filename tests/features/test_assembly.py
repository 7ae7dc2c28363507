"""Assembly: shapes, padding, and that the future and the padding change nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.errors import InvalidRequest
from rankd.features.assembly import assemble, bucket_of
from rankd.features.schema import candidate_specs, history_specs
from tests.features.sample_schema import DAY, make_history, make_items, make_schema, make_user

ITEMS, SCHEMA, USER = make_items(), make_schema(), make_user()


def test_bucket_is_the_smallest_that_holds() -> None:
    assert [bucket_of(size, (3, 8)) for size in (0, 3, 4, 8, 9)] == [3, 3, 8, 8, 8]


@given(st.lists(st.integers(1, 31), max_size=20), st.integers(1, 16))
def test_arrays_fit_the_specs(rows: list[int], count: int) -> None:
    candidates = np.full(count, 5, np.int32)
    features = assemble(SCHEMA, ITEMS, make_history(rows), candidates, USER, 100 * DAY)
    sizes = {"B": 1, "T": features.history["history_item"].shape[2], "C": 4 if count <= 4 else 16}
    for specs, arrays in ((history_specs(SCHEMA), features.history), (candidate_specs(SCHEMA), features.candidates)):
        assert {spec.name for spec in specs} == set(arrays)
        for spec in specs:
            assert arrays[spec.name].dtype == spec.dtype
            assert arrays[spec.name].shape == tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)
    assert features.num_candidates == count
    assert features.history["history_length"][0, 0] == min(len(rows), SCHEMA.history_length)


def test_worked_example() -> None:
    features = assemble(SCHEMA, ITEMS, make_history([7, 3, 9]), np.asarray([4], np.int32), USER, 100 * DAY)
    assert features.history["history_item"][0].tolist() == [[7, 3, 9], [7, 3, 9]]
    assert features.history["history_length"].tolist() == [[3, 3]]
    assert features.history["history_time"][0, 0].tolist() == [DAY, 2 * DAY, 3 * DAY]
    assert features.candidates["candidate_item"].tolist() == [[4, 0, 0, 0]]
    assert features.candidates["context_categories"].tolist() == [[2]]


@given(st.integers(0, 6))
def test_events_after_the_moment_do_not_exist(day: int) -> None:
    whole, candidates = make_history([7, 3, 9, 3, 5]), np.asarray([3, 9], np.int32)
    past = whole.until(min(day, 5))
    now = assemble(SCHEMA, ITEMS, whole, candidates, USER, day * DAY)
    then = assemble(SCHEMA, ITEMS, past, candidates, USER, day * DAY)
    for name, array in {**now.history, **now.candidates}.items():
        np.testing.assert_array_equal(array, {**then.history, **then.candidates}[name])


@pytest.mark.parametrize("count", [0, 17])
def test_a_list_that_fits_no_bucket_is_refused(count: int) -> None:
    with pytest.raises(InvalidRequest, match="allowed are 1 to 16"):
        assemble(SCHEMA, ITEMS, make_history([]), np.zeros(count, np.int32), USER, 0)
