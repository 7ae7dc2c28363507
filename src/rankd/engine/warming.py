"""Warm-up: every shape that requests will have runs once on every executor, so that no request pays for a first call.

On the way it is measured whether several users in one call pay (`schedule.packing`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rankd.artifact import Manifest
from rankd.engine.backend import Executor, StateType
from rankd.engine.state_arrays import APPEND_BUCKETS, empty_state, zeros
from rankd.features.schema import TensorSpec
from rankd.types import Allocate, Array, UserState

TRIALS = 3


class Shapes:
    """Arrays of zeros in the shapes of a model version, in the memory that requests have (`Backend.host_memory`)."""

    def __init__(self, manifest: Manifest, state_type: StateType, memory: Allocate | None = None) -> None:
        self.manifest, self._state_type, self._memory = manifest, state_type, memory
        self.rooms, self.candidate_buckets = manifest.schema.history_buckets, manifest.schema.candidate_buckets

    def history(self, tokens: int) -> dict[str, Array]:
        """Inputs of `encode`, or of `extend` with A in place of T."""
        return self._zeros(self.manifest.history_inputs, {"B": 1, "T": tokens})

    def candidates(self, bucket: int, users: int) -> dict[str, Array]:
        """Inputs of `score` beside the states."""
        return self._zeros(self.manifest.candidate_inputs, {"B": users, "C": bucket})

    def state(self, room: int) -> UserState:
        """The state of nobody."""
        lengths = (0,) * self.manifest.schema.num_sub_sequences
        return UserState(empty_state(self.manifest.state, room, self._state_type, memory=self._memory), lengths)

    def full(self, room: int) -> UserState:
        """One without a free place, not yet computed."""
        return UserState(self.state(room).arrays, (room,) * self.manifest.schema.num_sub_sequences)

    def _zeros(self, specs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> dict[str, Array]:
        shapes = {s: tuple(sizes[d] if isinstance(d, str) else d for d in s.shape) for s in specs}
        return {s.name: zeros(shape, np.dtype(s.dtype), self._memory) for s, shape in shapes.items()}


def warm(executor: Executor, shapes: Shapes, users_of: Mapping[int, Sequence[int]]) -> None:
    """Run every shape once. `users_of` gives, for each candidate bucket, the numbers of users that calls serve."""
    for room in shapes.rooms:
        state = shapes.state(room)
        if shapes.manifest.split:
            _encode(executor, shapes.history(room), state, wide=True)
            _encode(executor, shapes.history(room), state, wide=False)
        for new in APPEND_BUCKETS if shapes.manifest.extends else ():
            executor.extend(state, shapes.history(new))
        for bucket in shapes.candidate_buckets:
            for users in users_of[bucket]:
                executor.score([state] * users, shapes.candidates(bucket, users))


def score_ms(executor: Executor, shapes: Shapes, bucket: int, users: int) -> float:
    """Milliseconds of scoring `users` users of the largest room in one call, the best of a few.

    Each follows a call of another shape, as calls of real requests do: OpenVINO takes 2.4 ms to change from one shape
    to another (base's model, Zen 4), a quarter of a small call. Without that, lists were cut finer than paid.
    """
    states, candidates = [_full(executor, shapes, shapes.rooms[-1])] * users, shapes.candidates(bucket, users)
    other = next((one for one in shapes.candidate_buckets if one != bucket), bucket)
    nobody, few = [shapes.state(shapes.rooms[0])], shapes.candidates(other, 1)
    return best_ms(lambda: executor.score(states, candidates), lambda: executor.score(nobody, few))


def encode_ms(executor: Executor, shapes: Shapes, room: int, wide: bool = False) -> float:
    """Milliseconds of encoding a history that fills a room, the best of a few; 0 for a model without state. `wide`:
    with `Executor.encode_wide`."""
    if not shapes.manifest.split:
        return 0.0
    whole, into = _full_history(shapes, room), shapes.state(room)
    return best_ms(lambda: _encode(executor, whole, into, wide))


def most_new_tokens(executor: Executor, shapes: Shapes, whole_ms: Mapping[int, float]) -> dict[int, int]:
    """For each room, how many new tokens a block are cheaper to append than the whole is to encode, which takes
    `whole_ms`; 0: none."""
    most = dict.fromkeys(shapes.rooms, 0)
    for room in shapes.rooms if shapes.manifest.extends else ():
        state = _full(executor, shapes, room)
        for new in APPEND_BUCKETS:
            some = _full_history(shapes, new)
            if best_ms(lambda some=some, state=state: executor.extend(state, some)) < whole_ms[room]:  # type: ignore[misc]
                most[room] = new
    return most


def best_ms(call: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Milliseconds of a call, the best of a few after one that does not count; `before` comes before each."""
    call()
    best = float("inf")
    for _ in range(TRIALS):
        before()
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best * 1e3


def _encode(executor: Executor, history: Mapping[str, Array], into: UserState, wide: bool) -> None:
    executor.encode_wide = wide
    executor.encode(history, into.arrays)
    executor.encode_wide = False


def _full(executor: Executor, shapes: Shapes, room: int) -> UserState:
    """A state without a free place, so that nothing is left out for want of tokens."""
    if not shapes.manifest.split:
        lengths = (room,) * shapes.manifest.schema.num_sub_sequences
        return UserState(executor.encode(_full_history(shapes, room)), lengths)
    full, mark = shapes.full(room), f"warm-up {room}".encode()
    executor.encode(_full_history(shapes, room), full.arrays)
    executor.keep(mark)  # what is measured is a call for a state that is there, as most are
    return UserState(full.arrays, full.lengths, mark)


def _full_history(shapes: Shapes, tokens: int) -> dict[str, Array]:
    history = shapes.history(tokens)
    history["history_length"][...] = tokens
    return history
