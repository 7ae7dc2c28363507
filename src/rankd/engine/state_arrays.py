"""State arrays: how large they are, how users are put side by side for one call, how new tokens are written in.

A state tensor with a T dimension is laid out (B, N, ..., T, ...): its second dimension counts the blocks, whose lengths
differ. Worked example, N = 2, T = 4, lengths 3 and 1, one new event in block 0 alone: the addition's token 0 of block 0
goes to place 3, and the lengths become 4 and 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from rankd.engine.backend import StateType
from rankd.features.schema import TensorSpec
from rankd.types import Allocate, Array, UserState

APPEND_BUCKETS = (8, 32)
"""A: how many new events a block one call of `extend` takes, padded; more than the last are encoded anew."""

NUMPY_TYPE: dict[StateType, np.dtype[np.generic]] = {
    StateType.FP32: np.dtype(np.float32),
    StateType.BF16: np.dtype(np.uint16),
}


def dtype_of(spec: TensorSpec, state_type: StateType) -> np.dtype[np.generic]:
    """The NumPy type of a state array: floats follow the engine's state type."""
    return NUMPY_TYPE[state_type] if spec.dtype == "float32" else np.dtype(spec.dtype)


def shape_of(spec: TensorSpec, tokens: int, users: int = 1) -> tuple[int, ...]:
    """The shape of a state array with room for `tokens` tokens a block."""
    return tuple({"B": users, "T": tokens}[d] if isinstance(d, str) else d for d in spec.shape)


def empty_state(
    specs: Sequence[TensorSpec],
    tokens: int,
    state_type: StateType,
    users: int = 1,
    memory: Allocate | None = None,
) -> dict[str, Array]:
    """State arrays of B users with room for `tokens` tokens a block, of zeros: what is never written is finite.
    `memory` makes their memory, where it has to be of a kind."""
    return {spec.name: zeros(shape_of(spec, tokens, users), dtype_of(spec, state_type), memory) for spec in specs}


def zeros(shape: tuple[int, ...], dtype: np.dtype[np.generic], memory: Allocate | None = None) -> Array:
    """An array of zeros, in memory that `memory` makes if that is given."""
    if memory is None:
        return np.zeros(shape, dtype)
    return memory(dtype.itemsize * prod(shape)).view(dtype).reshape(shape)


def written(made: Mapping[str, Array], into: Mapping[str, Array] | None) -> Mapping[str, Array]:
    """What an engine made, in the arrays of its caller if there are any."""
    if into is None:
        return made
    for name, array in made.items():
        into[name][...] = array
    return into


def token_axis(spec: TensorSpec) -> int | None:
    """Which axis is T; None if the array does not grow with the history."""
    return spec.shape.index("T") if "T" in spec.shape else None


def tokens_of(specs: Sequence[TensorSpec], arrays: Mapping[str, Array]) -> int:
    """For how many tokens a block the arrays have room; 0 if none of them grows with the history."""
    sizes = [arrays[spec.name].shape[axis] for spec in specs if (axis := token_axis(spec)) is not None]
    return sizes[0] if sizes else 0


def write_additions(
    specs: Sequence[TensorSpec],
    arrays: Mapping[str, Array],
    lengths: Sequence[int],
    additions: Mapping[str, Array],
    counts: Sequence[int],
) -> None:
    """Write what `extend` made of `counts[n]` new events into a state's arrays, after `lengths[n]` old ones."""
    for spec in specs:
        array, added, axis = arrays[spec.name], additions[spec.name], token_axis(spec)
        if axis is None:
            array[...] = added
            continue
        whole = (slice(None),) * (axis - 2)
        for block, (start, count) in enumerate(zip(lengths, counts, strict=True)):
            old_block, new_block = array[0, block], added[0, block]
            old_block[(*whole, slice(start, start + count))] = new_block[(*whole, slice(0, count))]


def copy_tokens(specs: Sequence[TensorSpec], source: Mapping[str, Array], target: Mapping[str, Array]) -> None:
    """Copy a state into arrays with at least as much room; the rest of it is zeros, as padding is."""
    for spec in specs:
        array, axis = source[spec.name], token_axis(spec)
        if axis is None:
            target[spec.name][...] = array
        else:
            before, room = (slice(None),) * axis, array.shape[axis]
            target[spec.name][(*before, slice(0, room))] = array
            target[spec.name][(*before, slice(room, None))] = 0


class SideBySide:
    """Buffers in which the states of several users lie one after the other, for one call; kept from call to call."""

    def __init__(self, specs: Sequence[TensorSpec], state_type: StateType) -> None:
        self._specs, self._type = specs, state_type
        self._buffers: dict[tuple[int, int], dict[str, Array]] = {}

    def arrays(self, states: Sequence[UserState]) -> Mapping[str, Array]:
        """The state arrays of B users as one; of one user they are handed through, not copied.

        Rooms of different size are padded to the largest one.
        """
        if len(states) == 1:
            return states[0].arrays
        tokens = max(tokens_of(self._specs, state.arrays) for state in states)
        buffers = self._buffers.get((len(states), tokens))
        if buffers is None:
            buffers = empty_state(self._specs, tokens, self._type, len(states))
            self._buffers[len(states), tokens] = buffers
        for row, state in enumerate(states):
            copy_tokens(self._specs, state.arrays, {name: array[row : row + 1] for name, array in buffers.items()})
        return buffers
