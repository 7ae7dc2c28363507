"""How a state lies in memory: its arrays one after the other in a slab, as the engine has them, or smaller.

In: the specs of a state, the engine's state type, the storage. Out: sizes, and arrays over a slab's bytes. Where
storage and engine agree the arrays of a slab are the state itself; else they are converted on the way in and out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from rankd.engine.backend import StateType
from rankd.engine.state_arrays import dtype_of, empty_state, shape_of
from rankd.features.schema import TensorSpec
from rankd.states.arena import aligned
from rankd.states.state_config import Storage
from rankd.types import Array, Float32Array

SCALE = ".scale"  # "keys.scale" holds the scales of the int8 array "keys"
LARGEST = 127.0
STORED_TYPE: dict[Storage, np.dtype[np.generic]] = {
    Storage.FP32: np.dtype(np.float32),
    Storage.BF16: np.dtype(np.uint16),
    Storage.INT8: np.dtype(np.int8),
}
OWN_STORAGE = {StateType.FP32: Storage.FP32, StateType.BF16: Storage.BF16}


class StateLayout:
    """Where the arrays of a state with room for T tokens lie in a slab."""

    def __init__(self, specs: Sequence[TensorSpec], state_type: StateType, storage: Storage) -> None:
        self.specs, self.state_type = tuple(specs), state_type
        self.storage = OWN_STORAGE[state_type] if storage is Storage.AUTO else storage
        self.direct = self.storage is OWN_STORAGE[state_type]

    def size_bytes(self, tokens: int) -> int:
        """Bytes of a slab for `tokens` tokens a block."""
        return sum(aligned(prod(shape) * dtype.itemsize) for _, shape, dtype in self._places(tokens))

    def arrays(self, slab: Array, tokens: int) -> dict[str, Array]:
        """The stored arrays, as views of a slab's bytes."""
        views, start = {}, 0
        for name, shape, dtype in self._places(tokens):
            size = prod(shape) * dtype.itemsize
            views[name] = slab[start : start + size].view(dtype).reshape(shape)
            start += aligned(size)
        return views

    def pack(self, state: Mapping[str, Array], stored: Mapping[str, Array]) -> None:
        """Write a state's arrays over the stored ones, converted."""
        for spec in self.specs:
            array = state[spec.name]
            if spec.dtype != "float32":
                stored[spec.name][...] = array
            elif self.storage is Storage.INT8:
                numbers = self._to_float32(array)
                scale = np.abs(numbers).max(axis=-1, keepdims=True) / LARGEST
                stored[spec.name + SCALE][...] = scale
                stored[spec.name][...] = np.rint(numbers / np.where(scale > 0, scale, 1.0))
            elif self.direct:
                stored[spec.name][...] = array
            else:
                numbers = self._to_float32(array)
                stored[spec.name][...] = to_bf16(numbers) if self.storage is Storage.BF16 else numbers

    def unpack(self, stored: Mapping[str, Array], tokens: int) -> Mapping[str, Array]:
        """The state's arrays as the engine has them: the stored ones themselves where nothing is converted."""
        if self.direct:
            return stored
        state = empty_state(self.specs, tokens, self.state_type)
        for spec in self.specs:
            array = stored[spec.name]
            if spec.dtype != "float32":
                state[spec.name][...] = array
                continue
            if self.storage is Storage.INT8:
                numbers = array * stored[spec.name + SCALE]
            else:
                numbers = from_bf16(array) if self.storage is Storage.BF16 else array
            state[spec.name][...] = to_bf16(numbers) if self.state_type is StateType.BF16 else numbers
        return state

    def _places(self, tokens: int) -> list[tuple[str, tuple[int, ...], np.dtype[np.generic]]]:
        places: list[tuple[str, tuple[int, ...], np.dtype[np.generic]]] = []
        for spec in self.specs:
            shape = shape_of(spec, tokens)
            if spec.dtype != "float32":
                places.append((spec.name, shape, dtype_of(spec, self.state_type)))
                continue
            places.append((spec.name, shape, STORED_TYPE[self.storage]))
            if self.storage is Storage.INT8:
                places.append((spec.name + SCALE, (*shape[:-1], 1), np.dtype(np.float32)))
        return places

    def _to_float32(self, array: Array) -> Float32Array:
        return from_bf16(array) if self.state_type is StateType.BF16 else array


def to_bf16(numbers: Float32Array) -> Array:
    """bfloat16 as uint16: the upper half of a float32, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    rounded: Array = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return rounded


def from_bf16(halves: Array) -> Float32Array:
    """float32 of bfloat16 as uint16."""
    numbers: Float32Array = (halves.astype(np.uint32) << 16).view(np.float32)
    return numbers
