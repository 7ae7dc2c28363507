"""The hash index against a dict."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rankd.features.rows.decoding_kernels  # noqa: F401 - compiles now, before deadlines count
from rankd.features.rows.hash_index import HashIndex

# Few upper and few lower bits, so that keys share their first slot or differ in nothing else.
KEYS = st.one_of(
    st.integers(1, 2**64 - 1), st.integers(0, 40), st.integers(0, 40).map(lambda number: (number << 40) + 1)
)
VALUES = st.integers(-(2**31), 2**31 - 1)


def index_of(known: dict[int, int]) -> HashIndex:
    return HashIndex(np.fromiter(known, np.uint64, len(known)), np.fromiter(known.values(), np.int32, len(known)))


@given(st.dictionaries(KEYS, VALUES, max_size=80), st.lists(KEYS, max_size=40), VALUES)
def test_finds_what_a_dict_finds(known: dict[int, int], others: list[int], missing: int) -> None:
    asked = [*known, *others]
    out = np.zeros(len(asked), np.int32)
    index = index_of(known)
    index.find(np.asarray(asked, np.uint64), out, missing)
    assert out.tolist() == [known.get(key, missing) if key else missing for key in asked]
    slots = index.table.shape[0]
    assert slots >= 2 * len(known)
    assert slots & (slots - 1) == 0


def test_nothing_is_found_in_an_empty_index() -> None:
    out = np.zeros(2, np.int32)
    index_of({}).find(np.asarray([0, 7], np.uint64), out, -3)
    assert out.tolist() == [-3, -3]
    index_of({5: 1}).find(np.zeros(0, np.uint64), out[:0], 0)


def test_a_key_has_one_value() -> None:
    with pytest.raises(ValueError, match="twice"):
        HashIndex(np.asarray([3, 9, 3], np.uint64), np.asarray([1, 2, 1], np.int32))
    with pytest.raises(ValueError, match="2 keys and 1 values"):
        HashIndex(np.asarray([3, 9], np.uint64), np.asarray([1], np.int32))


def test_key_0_may_come_often_and_means_nothing() -> None:
    index = HashIndex(np.asarray([0, 4, 0], np.uint64), np.asarray([1, 2, 3], np.int32))
    out = np.zeros(2, np.int32)
    index.find(np.asarray([0, 4], np.uint64), out, 9)
    assert out.tolist() == [9, 2]


def test_out_has_a_place_for_each_key() -> None:
    with pytest.raises(ValueError, match="1 places for 2 keys"):
        index_of({1: 1}).find(np.asarray([1, 2], np.uint64), np.zeros(1, np.int32), 0)


def test_a_million_keys() -> None:
    keys = np.random.default_rng(0).integers(1, 2**64, 1_000_000, dtype=np.uint64)
    index = HashIndex(keys, np.arange(1_000_000, dtype=np.int32))
    assert index.memory_bytes == 2**21 * 16
    out = np.zeros(1_000_000, np.int32)
    index.find(keys, out, -1)
    np.testing.assert_array_equal(out, np.arange(1_000_000))
    index.find(keys ^ np.uint64(1), out, -1)
    assert (out == -1).mean() > 0.999
