"""A ranker so plain that its answers can be computed by hand, behind the Executor protocol.

A token's memory is (item row, sum of the item rows up to it, time): it depends on the history before it, as keys and
values of a causal transformer do. A user's score is a weighted sum over the tokens that are real.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rankd.engine.backend import InThisProcess, StateType
from rankd.engine.state_arrays import empty_state
from rankd.features.assembly import history_arrays
from rankd.features.schema import FeatureSchema, Strategy, SubSequence, TensorSpec
from rankd.types import Array, Float32Array, UserHistory, UserState
from tests.features.sample_schema import make_items, make_schema

SPECS = (TensorSpec("memory", "float32", ("B", 2, "T", 3)), TensorSpec("lengths", "int32", ("B", 2)))
ITEMS = make_items()


def plain_schema(window_step: int = 1) -> FeatureSchema:
    """Two blocks of up to 8 tokens: the newest events, and the newest likes."""
    import msgspec

    schema = make_schema(SubSequence(Strategy.RECENT), SubSequence(Strategy.EVENT, events=("like",)))
    return msgspec.structs.replace(schema, window_step=window_step, stored_history=20)


def tokens_of(history: UserHistory, schema: FeatureSchema) -> dict[str, Array]:
    """The inputs of encode."""
    return history_arrays(schema, ITEMS, history)


class PlainExecutor(InThisProcess):
    """Counts its calls; `fail` makes the next one raise."""

    def __init__(self) -> None:
        self.encoded = self.extended = 0
        self.fail: Exception | None = None

    def encode(self, history: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        """The memory of every token."""
        self._maybe_fail()
        self.encoded += 1
        made = into if into is not None else empty_state(SPECS, history["history_item"].shape[2], StateType.FP32)
        made["memory"][...] = memory_of(history, np.zeros(2, np.float32))
        made["lengths"][...] = history["history_length"]
        return made

    def extend(self, state: UserState, new: Mapping[str, Array]) -> Mapping[str, Array]:
        """The memory of new tokens, which goes on from the sum of the last old one."""
        self._maybe_fail()
        self.extended += 1
        memory = state.arrays["memory"]
        sums = np.asarray(
            [memory[0, n, length - 1, 1] if length else 0.0 for n, length in enumerate(state.lengths)], np.float32
        )
        return {"memory": memory_of(new, sums), "lengths": state.arrays["lengths"] + new["history_length"]}

    def score(self, states: Sequence[UserState], candidates: Mapping[str, Array]) -> Float32Array:
        """Not asked for here: `score_of` reads a state."""
        raise AssertionError

    def _maybe_fail(self) -> None:
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error


def memory_of(tokens: Mapping[str, Array], sums: Float32Array) -> Float32Array:
    """(1, 2, T, 3) float32 of tokens; padding has a memory too, which nobody may read."""
    items = tokens["history_item"].astype(np.float32)
    running = np.cumsum(items, axis=2) + sums[None, :, None]
    return np.stack([items, running, tokens["history_time"] / 86_400.0], axis=-1).astype(np.float32)


def score_of(state: UserState) -> Float32Array:
    """(2, 3) float32: the sums over the real tokens of each block; its own `lengths` have to agree."""
    assert tuple(state.arrays["lengths"][0].tolist()) == state.lengths
    memory = state.arrays["memory"][0]
    return np.stack([memory[n, :length].sum(0) for n, length in enumerate(state.lengths)])


def truth(history: UserHistory, schema: FeatureSchema) -> Float32Array:
    """The score of a history, computed from nothing but itself."""
    tokens = tokens_of(history, schema)
    made = PlainExecutor().encode(tokens)
    return score_of(UserState(made, tuple(tokens["history_length"][0].tolist())))
