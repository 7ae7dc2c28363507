"""One executor on a GPU: a stream, and for each bucket of a call its memory and its captured launches.

A call is: write into pinned memory, one transfer, one graph, one transfer back, one wait. Memory is taken and kernels
are compiled when a bucket is met for the first time, which is at warm-up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rankd.engine.backend import InThisProcess, StateType
from rankd.engine.cuda.call_shapes import (
    Bucket,
    StateShape,
    arrays_of,
    history_sections,
    no_states,
    score_sections,
    write_candidates,
    write_events,
    write_pages,
    write_whole,
)
from rankd.engine.cuda.call_staging import NOBODY, CallStaging, rung
from rankd.engine.cuda.climber_steps import Block, HistorySteps, ScoreSteps
from rankd.engine.cuda.climber_weights import ClimberWeights
from rankd.engine.cuda.cuda_device import Device
from rankd.engine.state_arrays import APPEND_BUCKETS, empty_state
from rankd.features.schema import FeatureSchema, TensorSpec
from rankd.types import Array, Float32Array, UserState


@dataclass(frozen=True, slots=True)
class CudaModel:
    """What executors share: weights, and what a call looks like."""

    weights: ClimberWeights
    schema: FeatureSchema
    specs: Sequence[TensorSpec]
    dtype: torch.dtype
    block: Block

    @property
    def state_type(self) -> StateType:
        """How states leave the GPU: in the type of the arithmetic."""
        return StateType.BF16 if self.dtype is torch.bfloat16 else StateType.FP32

    def state_shape(self) -> StateShape:
        """Of the states that a call brings along, with room for what may be appended."""
        longest = max(*self.schema.history_buckets, self.schema.history_length) + APPEND_BUCKETS[-1]
        most_pages = -(-longest // self.block.page)
        weights = self.weights
        return StateShape(
            weights.blocks, len(weights.layers), weights.attention_width, self.block.page, most_pages, self.dtype
        )


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A bucket's memory and its launches; `result` is pinned, what `made` is copied to."""

    staging: CallStaging
    launch: Callable[[], None]
    made: Tensor
    result: Tensor

    def run(self, device: Device, filled_pages: int) -> None:
        """Everything between the host's writing and its reading."""
        self.staging.send(filled_pages)
        self.launch()
        device.transfer(self.result, self.made)
        device.wait()


class CudaExecutor(InThisProcess):
    """Runs one call at a time on its own stream."""

    def __init__(self, model: CudaModel, device: Device) -> None:
        self._model, self._device, self._shape = model, device, model.state_shape()
        self._scoring: dict[Bucket, _Prepared] = {}
        self._encoding: dict[Bucket, _Prepared] = {}

    def encode(self, history: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        """The state of a history (B = 1), in new arrays or in those of the caller."""
        made = self.encode_all([history], [into])
        return made[0]

    def encode_all(
        self, histories: Sequence[Mapping[str, Array]], into: Sequence[Mapping[str, Array] | None]
    ) -> list[Mapping[str, Array]]:
        """The states of several users, each B = 1, in one call."""
        fresh = self._new_tokens(histories, no_states(self._shape, len(histories)))
        made, first = [], np.zeros(self._shape.blocks, np.int64)
        for history, own in zip(histories, into, strict=True):
            lengths = history["history_length"]
            if own is None:
                room = history["history_time"].shape[2]
                own = empty_state(self._model.specs, room, self._model.state_type)
            self._copy(fresh, own["keys_values"], first, lengths[0])
            own["times"][...], own["lengths"][...] = history["history_time"], lengths
            made.append(own)
            first += lengths[0]
        return made

    def extend(self, state: UserState, new: Mapping[str, Array]) -> Mapping[str, Array]:
        """What A new events a block add to a state."""
        fresh = self._new_tokens([new], [state.arrays])
        times, counts = new["history_time"], new["history_length"]
        made = empty_state(self._model.specs, times.shape[2], self._model.state_type)
        self._copy(fresh, made["keys_values"], np.zeros(self._shape.blocks, np.int64), counts[0])
        made["times"][...], made["lengths"][...] = times, state.arrays["lengths"] + counts
        return made

    def score(self, states: Sequence[UserState], candidates: Mapping[str, Array]) -> Float32Array:
        """Logits (B, C, K) of all candidate rows, padding included; a copy. One state for each of the B users."""
        users, count = candidates["candidate_item"].shape
        if count == 0:
            return np.zeros((users, 0, self._model.weights.num_tasks), np.float32)
        bucket = Bucket.of(users * count, users)
        with self._device.running():
            prepared = self._scoring.get(bucket)
            if prepared is None:
                prepared = self._scoring[bucket] = self._prepare_score(bucket)
            host = prepared.staging.host
            filled = write_pages(host, self._shape, arrays_of(states))
            write_candidates(host, candidates, self._model.block)
            prepared.run(self._device, filled)
        logits: Float32Array = prepared.result[0, : users * count].numpy().reshape(users, count, -1).copy()
        return logits

    def _new_tokens(self, histories: Sequence[Mapping[str, Array]], known: Sequence[Mapping[str, Array]]) -> Array:
        """Keys and values (N, L, 2, R, A) of new events, users one after the other; valid until the next call."""
        new = np.concatenate([history["history_length"] for history in histories])
        bucket = Bucket(rung(int(new.sum(0).max())), Bucket.of(1, len(histories)).users)
        with self._device.running():
            prepared = self._encoding.get(bucket)
            if prepared is None:
                prepared = self._encoding[bucket] = self._prepare_history(bucket)
            host = prepared.staging.host
            filled = write_pages(host, self._shape, known, new)
            write_events(host, self._shape, histories, self._model.block)
            prepared.run(self._device, filled)
        if self._model.dtype is torch.bfloat16:
            halves: Array = prepared.result.view(torch.int16).numpy().view(np.uint16)
            return halves
        fresh: Array = prepared.result.numpy()
        return fresh

    def _copy(self, fresh: Array, keys_values: Array, first: Array, counts: Array) -> None:
        """A user's rows of `fresh` into a state (1, N, L, 2, T, A), whose rest becomes zeros."""
        for block, count in enumerate(counts.tolist()):
            start = int(first[block])
            keys_values[0, block, :, :, :count] = fresh[block, :, :, start : start + count]
            keys_values[0, block, :, :, count:] = 0

    def _prepare_score(self, bucket: Bucket) -> _Prepared:
        model, device = self._model, self._device
        sections = score_sections(model.schema, self._shape, bucket.rows, bucket.users, model.block)
        staging = CallStaging(device, sections)
        steps = ScoreSteps(device, model.weights, model.dtype, staging.there, model.block)
        return self._prepared(bucket, staging, steps, steps.logits)

    def _prepare_history(self, bucket: Bucket) -> _Prepared:
        model, device = self._model, self._device
        sections = history_sections(model.schema, self._shape, bucket.rows, bucket.users, model.block)
        staging = CallStaging(device, sections)
        steps = HistorySteps(device, model.weights, model.dtype, staging.there, model.block)
        return self._prepared(bucket, staging, steps, steps.fresh)

    def _prepared(self, bucket: Bucket, staging: CallStaging, launch: Callable[[], None], made: Tensor) -> _Prepared:
        result = self._device.pinned(made.nbytes).view(made.dtype).view(made.shape)
        staging.host["tiles"][..., 0] = NOBODY
        filled = 0
        if self._device.measures:
            filled = write_whole(staging.host, self._shape, bucket, self._model.block)
        staging.send(filled)
        return _Prepared(staging, self._device.captured(launch), made, result)
