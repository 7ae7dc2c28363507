"""Rows as tables keep them: how far they are from what they were."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rankd.embeddings.row_storage import SCALED, pack_rows, unpack_rows
from rankd.embeddings.table_spec import TableSpec, TableStorage
from rankd.errors import BuildError
from rankd.types import Float32Array

ULP = 2.0**-23
blocks = arrays.arrays(
    np.float32,
    st.tuples(st.integers(0, 6), st.integers(1, 20)),
    elements=st.floats(-(2.0**126), 2.0**126, width=32) | st.sampled_from([0.0, 1.0, -1.0, 2.0**-149]),
)


def test_the_worked_example() -> None:
    records = pack_rows(np.asarray([[1.0, 2.25, 4.0]], np.float32), TableStorage.INT4)
    assert records[0, :2].tolist() == [0x60, 0x0F]
    assert records[0, 2:].view(np.float32).tolist() == [np.float32(0.2), 1.0]
    assert unpack_rows(records, TableStorage.INT4, 3)[0] == pytest.approx([1.0, 2.2, 4.0])


@pytest.mark.parametrize("storage", TableStorage)
@given(numbers=blocks)
def test_a_record_has_the_bytes_that_the_spec_says(storage: TableStorage, numbers: Float32Array) -> None:
    if storage is TableStorage.FP16:
        numbers = np.clip(numbers, -60_000, 60_000)
    rows, dim = numbers.shape
    records = pack_rows(numbers, storage)
    assert records.shape == (rows, TableSpec("t", max(rows, 1), dim, storage).row_bytes)
    read = unpack_rows(records, storage, dim)
    assert read.shape == numbers.shape
    if storage is TableStorage.FP32:
        assert np.array_equal(read, numbers)
    if storage is TableStorage.FP16:
        assert np.array_equal(read, numbers.astype(np.float16))


@pytest.mark.parametrize("storage", SCALED)
@given(numbers=blocks)
def test_integers_are_at_most_half_a_scale_away(storage: TableStorage, numbers: Float32Array) -> None:
    records = pack_rows(numbers, storage)
    scale = np.ascontiguousarray(records[:, -8:]).view(np.float32)[:, :1].astype(np.float64)
    read = unpack_rows(records, storage, numbers.shape[1]).astype(np.float64)
    largest = np.abs(numbers).max(axis=1, initial=0.0)[:, None]
    assert (np.abs(read - numbers) <= scale / 2 + 4 * ULP * largest + 2.0**-149).all()
    span = (numbers.max(axis=1) - numbers.min(axis=1).astype(np.float64))[:, None] if len(numbers) else scale
    assert (scale <= span / (255 if storage is TableStorage.INT8 else 15) * (1 + 2 * ULP) + 2.0**-149).all()


@pytest.mark.parametrize("storage", SCALED)
def test_the_smallest_numbers_stay_in_range(storage: TableStorage) -> None:
    """A scale is rounded up: of 1.4 times the smallest float there is only 1 or 2."""
    numbers = (np.asarray([[0, 8, 21, 100, 357]]) * 2.0**-149).astype(np.float32)
    records = pack_rows(numbers, storage)
    scale = np.ascontiguousarray(records[:, -8:]).view(np.float32)[0, 0]
    assert np.abs(unpack_rows(records, storage, 5) - numbers).max() <= max(scale / 2, 2.0**-149)


@pytest.mark.parametrize("storage", SCALED)
@pytest.mark.parametrize("number", [0.0, -3.25, 1e30])
def test_constant_rows_are_exact(storage: TableStorage, number: float) -> None:
    numbers = np.full((2, 5), number, np.float32)
    assert np.array_equal(unpack_rows(pack_rows(numbers, storage), storage, 5), numbers)


@pytest.mark.parametrize("storage", TableStorage)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(storage: TableStorage, wrong: float) -> None:
    numbers = np.zeros((4, 3), np.float32)
    numbers[2, 1] = wrong
    with pytest.raises(BuildError, match="row 2 of the block is not finite"):
        pack_rows(numbers, storage)


def test_what_a_storage_cannot_hold_is_refused() -> None:
    with pytest.raises(BuildError, match=r"row 1 .* above 65504"):
        pack_rows(np.asarray([[1], [-7e4]], np.float32), TableStorage.FP16)
    for storage in SCALED:
        with pytest.raises(BuildError, match=r"row 0 .* wider than float32"):
            pack_rows(np.asarray([[-3e38, 3e38]], np.float32), storage)
