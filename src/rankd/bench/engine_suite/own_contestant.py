"""Our engine as a contestant: all of a request, scoring over kept states, encoding, extending; several users in a call
where the executor can.

In: a Load and its requests. Out: `Calls` by Work. `contestants.py` times them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rankd.artifact import Artifact, Manifest
from rankd.bench.engine_suite.contestant_calls import Calls
from rankd.bench.engine_suite.contestant_messages import APPENDED, Load, Work
from rankd.engine.backend import EngineConfig, Executor, JointExecutor
from rankd.engine.state_arrays import APPEND_BUCKETS, token_axis, write_additions
from rankd.engine.targets import load_backend
from rankd.features.assembly import appended_tokens
from rankd.types import Array, Features, Float32Array, UserState


def rankd_calls(load: Load, requests: Sequence[Features]) -> dict[Work, Calls]:
    """Our engine: all of a request, the scoring over states that are kept, the encoding alone, the extending."""
    config = EngineConfig(load.target, load.precision, executors=1, threads=load.threads)
    artifact = Artifact.open(Path(load.artifact))
    executor = load_backend(artifact, config).executor()
    histories = [alone(one.history) for one in requests]
    lengths = [[tuple(one["history_length"][0].tolist()) for one in users] for users in histories]
    joint = joint_of(executor, histories)

    def encode(i: int) -> list[UserState]:
        """Each under a mark of its own, so that the engine may keep it where it computes."""
        marks = [next(numbers).to_bytes(8, "little") for _ in histories[i]]
        states = encoded(executor, joint, histories[i], marks)
        return [UserState(*one) for one in zip(states, lengths[i], marks, strict=True)]

    def score(i: int, states: Sequence[UserState]) -> Float32Array:
        return executor.score(states, requests[i].candidates)[:, : requests[i].num_candidates]

    def cold(i: int) -> Float32Array:
        return score(i, encode(i))

    def warm(i: int) -> Float32Array:
        return score(i, kept[i])

    numbers = itertools.count()
    kept = [[copy_of(state) for state in encode(i)] for i in range(len(requests))]
    return {
        Work.COLD: Calls(cold, cold),
        Work.WARM: Calls(warm, warm),
        Work.ENCODE: Calls(encode, cold),
        Work.EXTEND: extend_calls(executor, artifact.manifest, requests, histories),
    }


def alone(history: Mapping[str, Array]) -> list[dict[str, Array]]:
    """The histories of several users, each B = 1."""
    users = len(history["history_length"])
    return [{name: array[user : user + 1] for name, array in history.items()} for user in range(users)]


def joint_of(executor: Executor, histories: Sequence[Sequence[Mapping[str, Array]]]) -> JointExecutor | None:
    """The executor, where requests have several users and it computes those in one call. Not asked in what is timed:
    the check takes longer than it looks."""
    return executor if len(histories[0]) > 1 and isinstance(executor, JointExecutor) else None


def encoded(
    executor: Executor, joint: JointExecutor | None, histories: Sequence[Mapping[str, Array]], marks: Sequence[bytes]
) -> Sequence[Mapping[str, Array]]:
    """States of several users: in one call where the executor can, else one after the other."""
    if joint is not None:
        together = joint.encode_all(histories, [None] * len(histories))
        joint.keep_all(marks)
        return together
    states = []
    for history, mark in zip(histories, marks, strict=True):
        states.append(executor.encode(history))
        executor.keep(mark)
    return states


def extended(
    executor: Executor, joint: JointExecutor | None, users: Sequence[Growing]
) -> Iterable[Mapping[str, Array]]:
    """What states grow by: in one call where the executor can, else each valid until the next one is asked for."""
    if joint is not None:
        return joint.extend_all([user.state for user in users], [user.new for user in users])
    return (executor.extend(user.state, user.new) for user in users)


def extend_calls(
    executor: Executor,
    manifest: Manifest,
    requests: Sequence[Features],
    histories: Sequence[Sequence[Mapping[str, Array]]],
) -> Calls:
    """The newest APPENDED events of each history, spread over its blocks, go to the state of the events before.
    `histories` of each request's users."""
    growing = [[Growing.of(executor, manifest, one) for one in users] for users in histories]
    joint = joint_of(executor, histories)

    def call(i: int) -> None:
        for user in growing[i]:
            user.start_anew()
        for user, added in zip(growing[i], extended(executor, joint, growing[i]), strict=True):
            write_additions(manifest.state, user.state.arrays, user.state.lengths, added, user.counts)

    def logits(i: int) -> Float32Array:
        call(i)
        longer = [UserState(user.state.arrays, user.whole) for user in growing[i]]
        return executor.score(longer, requests[i].candidates)[:, : requests[i].num_candidates]

    return Calls(call, logits)


@dataclass(frozen=True, slots=True)
class Growing:
    """A user's `state` before the last `counts` events of each block, those events, and how long the `whole` is.
    `before` is what does not grow but is replaced."""

    state: UserState
    new: Mapping[str, Array]
    counts: list[int]
    whole: tuple[int, ...]
    before: Mapping[str, Array]

    @classmethod
    def of(cls, executor: Executor, manifest: Manifest, history: Mapping[str, Array]) -> Growing:
        """Of a history (B = 1)."""
        lengths = history["history_length"][0]
        counts = np.minimum(lengths, [len(part) for part in np.array_split(np.arange(APPENDED), len(lengths))])
        known = lengths - counts
        state = copy_of(UserState(executor.encode(shortened(history, known)), tuple(known.tolist())))
        new = appended_tokens(history, state.lengths, APPEND_BUCKETS)
        before = {s.name: state.arrays[s.name].copy() for s in manifest.state if token_axis(s) is None}
        return cls(state, new, counts.tolist(), tuple(lengths.tolist()), before)

    def start_anew(self) -> None:
        """Let each call start from what the state before has."""
        for name, whole in self.before.items():
            self.state.arrays[name][...] = whole


def shortened(history: Mapping[str, Array], lengths: Array) -> dict[str, Array]:
    """The first `lengths[n]` tokens of each block; nothing is left of the rest, so no score can come from it."""
    arrays = {name: np.array(array) for name, array in history.items()}
    arrays["history_length"][0] = lengths
    for name, array in arrays.items():
        for block, length in enumerate(lengths.tolist() if name != "history_length" else ()):
            array[0, block, length:] = 0
    return arrays


def copy_of(state: UserState) -> UserState:
    """A state to keep: what an executor hands out is its own until its next call."""
    return UserState({name: np.array(array) for name, array in state.arrays.items()}, state.lengths, state.mark)
