"""How states lie in memory: what is packed comes back, within the stated error of its storage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd.engine.backend import StateType
from rankd.engine.state_arrays import empty_state
from rankd.features.schema import TensorSpec
from rankd.states.state_config import Storage
from rankd.states.storage import StateLayout, from_bf16, to_bf16
from rankd.types import Array, Float32Array

SPECS = (
    TensorSpec("keys", "float32", ("B", 2, 3, "T", 8)),
    TensorSpec("times", "int32", ("B", 2, "T")),
    TensorSpec("user", "float32", ("B", 5)),
)
RELATIVE = {Storage.FP32: 0.0, Storage.BF16: 2**-8, Storage.INT8: 0.5 / 127}  # of the largest number of a row


def random_state(seed: int, tokens: int, state_type: StateType) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    state = empty_state(SPECS, tokens, state_type)
    for spec in SPECS:
        shape = state[spec.name].shape
        if spec.dtype == "int32":
            state[spec.name][...] = random.integers(-(2**31), 2**31, shape)
        else:
            numbers = (random.standard_normal(shape) * 10.0 ** random.integers(-6, 6)).astype(np.float32)
            state[spec.name][...] = to_bf16(numbers) if state_type is StateType.BF16 else numbers
    return state


def floats(array: Array) -> Float32Array:
    return from_bf16(array) if array.dtype == np.uint16 else array


@pytest.mark.parametrize("storage", [s for s in Storage if s is not Storage.AUTO])
@pytest.mark.parametrize("state_type", StateType)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 20))
def test_a_state_comes_back(storage: Storage, state_type: StateType, seed: int, tokens: int) -> None:
    layout = StateLayout(SPECS, state_type, storage)
    slab = np.zeros(layout.size_bytes(tokens), np.uint8)
    stored = layout.arrays(slab, tokens)
    state = random_state(seed, tokens, state_type)
    layout.pack(state, stored)
    again = layout.unpack(stored, tokens)
    own = 0.0 if state_type is StateType.FP32 else 2**-8
    for spec in SPECS:
        if spec.dtype == "int32":
            np.testing.assert_array_equal(again[spec.name], state[spec.name])
            continue
        before, after = floats(state[spec.name]), floats(again[spec.name])
        bound = np.abs(before).max(axis=-1, keepdims=True) * (RELATIVE[storage] + (own if not layout.direct else 0.0))
        assert (np.abs(before - after) <= bound * 1.001).all()
    packed_again = {name: array.copy() for name, array in stored.items()}
    layout.pack(again, packed_again)  # packing what came back changes nothing: a state may be extended many times
    if storage is not Storage.INT8:
        assert all(np.array_equal(packed_again[name], stored[name]) for name in stored)


def test_auto_is_what_the_engine_has() -> None:
    assert StateLayout(SPECS, StateType.BF16, Storage.AUTO).direct
    assert StateLayout(SPECS, StateType.FP32, Storage.AUTO).storage is Storage.FP32
    half = StateLayout(SPECS, StateType.BF16, Storage.AUTO).size_bytes(256)
    assert half < 0.6 * StateLayout(SPECS, StateType.FP32, Storage.AUTO).size_bytes(256)
    assert StateLayout(SPECS, StateType.BF16, Storage.INT8).size_bytes(256) < half


@given(
    st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**120), max_value=2.0**120),
        min_size=1,
    )
)
def test_bfloat16_rounds_to_the_nearest(numbers: list[float]) -> None:
    exact = np.asarray(numbers, np.float32)
    rounded = from_bf16(to_bf16(exact))
    assert (np.abs(rounded - exact) <= np.abs(exact) * 2**-8 + 1e-40).all()
    np.testing.assert_array_equal(from_bf16(to_bf16(rounded)), rounded)
