"""Staging: the input arrays of one executor, allocated once, into which `assembly.py` writes request after request.

In: a schema, and how many users share a call (`schedule.packing`). Out: views. All inputs of a call lie in one block of
memory, each from a multiple of 64 bytes on, so that a device copies them in one transfer. Worked example, bucket 16 for
up to 2 users, items of 3 categorical columns:

    bytes    0..127 candidate_item (2, 16)    128..135 context_time (2,)    192..575 candidate_categories (2, 16, 3)
    row(1)   candidate_item[1:2], context_time[1:2], ...: where the second user's request is written
    call(0, 2), call(1, 1)   the users of a call, which lie side by side already

What an executor reads is overwritten by the requests of its next call: its thread scores what it assembled before it
assembles more. Of a history nothing is read any more when it is encoded: who lends a state copies what an engine hands
through (`states.lending.of_its_own`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from rankd.features.schema import FeatureSchema, TensorSpec, candidate_specs, history_specs
from rankd.types import Allocate, Array, Bytes

ALIGNMENT = 64
"""Bytes of a cache line, and of the widest vector of a CPU."""


@dataclass(frozen=True, slots=True)
class Block:
    """Arrays in one piece of memory: `memory` (bytes,) uint8 begins with the first and ends with the last of them."""

    memory: Bytes
    arrays: Mapping[str, Array]


class CandidateBuffers:
    """The inputs of `score` beside the states (see `candidate_specs`), for up to B users of one candidate bucket."""

    def __init__(
        self, specs: Sequence[TensorSpec], most_users: int, bucket: int, memory: Allocate | None = None
    ) -> None:
        self.most_users = most_users
        self.block = allocate(specs, {"B": most_users, "C": bucket}, memory)
        self._rows = [self.call(user, 1) for user in range(most_users)]

    def row(self, user: int) -> Mapping[str, Array]:
        """Views (1, ...) of one user's inputs, 0 <= user < most_users."""
        return self._rows[user]

    def call(self, first: int, count: int) -> Mapping[str, Array]:
        """Contiguous views (count, ...) of the inputs of users `first` to `first + count - 1`."""
        return {name: array[first : first + count] for name, array in self.block.arrays.items()}


class InputBuffers:
    """All inputs of one executor: a block for each candidate bucket, and one for each history bucket (B = 1).

    `most_users` says for how many users a call of each candidate bucket is; 1 where it says nothing. `memory` makes the
    memory of the blocks, where it has to be of a kind.
    """

    def __init__(self, schema: FeatureSchema, most_users: Mapping[int, int], memory: Allocate | None = None) -> None:
        specs = candidate_specs(schema)
        self._candidates = {
            bucket: CandidateBuffers(specs, most_users.get(bucket, 1), bucket, memory)
            for bucket in schema.candidate_buckets
        }
        self._histories = {
            tokens: allocate(history_specs(schema), {"B": 1, "T": tokens}, memory) for tokens in schema.history_buckets
        }

    def candidates(self, bucket: int) -> CandidateBuffers:
        """Those of a candidate bucket of the schema."""
        return self._candidates[bucket]

    def history(self, tokens: int) -> Block:
        """The inputs of `encode` (see `history_specs`) of a history bucket of the schema."""
        return self._histories[tokens]


def allocate(specs: Sequence[TensorSpec], sizes: Mapping[str, int], memory: Allocate | None = None) -> Block:
    """Zeroed arrays of the given specs, one after the other, each aligned; `sizes` gives the dimensions that differ."""
    shapes = [tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape) for spec in specs]
    starts, end = [], 0
    for spec, shape in zip(specs, shapes, strict=True):
        starts.append(-(-end // ALIGNMENT) * ALIGNMENT)
        end = starts[-1] + np.dtype(spec.dtype).itemsize * prod(shape)
    whole = (memory or _aligned_zeros)(end)
    arrays = {
        spec.name: np.frombuffer(whole, spec.dtype, prod(shape), start).reshape(shape)
        for spec, shape, start in zip(specs, shapes, starts, strict=True)
    }
    return Block(whole, arrays)


def unwritten(num_bytes: int) -> Bytes:
    """Aligned memory for who writes all of it that is read: to zero megabytes of sums takes as long as to copy them."""
    return _aligned(np.empty(num_bytes + ALIGNMENT, np.uint8), num_bytes)


def _aligned_zeros(num_bytes: int) -> Bytes:
    return _aligned(np.zeros(num_bytes + ALIGNMENT, np.uint8), num_bytes)


def _aligned(raw: Bytes, num_bytes: int) -> Bytes:
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + num_bytes]
