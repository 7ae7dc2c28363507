"""One executor on a GPU: for each bucket of a call its memory and its captured launches, on streams that it may share.

A call is: write into pinned memory, one transfer, one graph, one transfer back, one wait; states that the GPU does not
have go before it (`arriving_states.py`), and what `encode` makes goes straight into the caller's arrays where the GPU
can write to them. Memory is taken and kernels are compiled when a bucket is met for
the first time, which is at warm-up. Executors that share their streams have several calls under way on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankd.engine.backend import InThisProcess, StateType
from rankd.engine.cuda.arriving_states import Arrivals
from rankd.engine.cuda.call_shapes import (
    Bucket,
    check_lengths,
    check_types,
    history_sections,
    score_sections,
    write_candidates,
    write_events,
    write_homes,
    write_table,
    write_whole,
)
from rankd.engine.cuda.call_staging import HOST_TYPES, NOBODY, CallStaging
from rankd.engine.cuda.cuda_device import Device, Way
from rankd.engine.cuda.events_together import EventsTogether, NewEvents, sizes_of
from rankd.engine.cuda.kernels.triton_host_states import Homes, deliver_rows
from rankd.engine.cuda.paged_states import PageType, StateShape
from rankd.engine.cuda.pinned_memory import PinnedMemory
from rankd.engine.cuda.ranker_steps import Block, HistorySteps, ScoreSteps
from rankd.engine.cuda.ranker_weights import RankerWeights
from rankd.engine.cuda.state_pool import PlacedState, StatePool
from rankd.engine.state_arrays import APPEND_BUCKETS, empty_state
from rankd.features.schema import FeatureSchema, TensorSpec
from rankd.types import Array, Float32Array, UserState

OWN_PAGES = {torch.float32: PageType.FP32, torch.bfloat16: PageType.BF16}


@dataclass(frozen=True, slots=True)
class CudaModel:
    """What executors share: weights, and what a call looks like."""

    weights: RankerWeights
    schema: FeatureSchema
    specs: Sequence[TensorSpec]
    dtype: torch.dtype
    block: Block

    @property
    def state_type(self) -> StateType:
        """How states leave the GPU: in the type of the arithmetic."""
        return StateType.BF16 if self.dtype is torch.bfloat16 else StateType.FP32

    def state_shape(self, kind: PageType | None = None) -> StateShape:
        """Of states, with room for what may be appended; in pages of a kind, or of the type of the arithmetic."""
        longest = max(*self.schema.history_buckets, self.schema.history_length) + APPEND_BUCKETS[-1]
        most_pages, weights = -(-longest // self.block.page), self.weights
        layers, heads, wide = weights.layers.depth, weights.tables.heads, weights.attention_width
        own = kind or OWN_PAGES[self.dtype]
        return StateShape(weights.blocks, layers, heads, wide, self.block.page, most_pages, self.dtype, own)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A bucket's memory and its launches; `result` is pinned, what `made` is copied to. `deliver` writes what it can of
    that into arrays of the host. `sent`, `computed` and `fetched` are when the call has come so far."""

    staging: CallStaging
    launch: Callable[[], None]
    made: Tensor
    result: Tensor
    sent: Any
    computed: Any
    fetched: Any
    deliver: Callable[[], None] | None = None

    def send(self, device: Device) -> None:
        """What the host has written is on its way."""
        self.staging.send()
        device.record(self.sent, Way.IN)
        device.behind(Way.COMPUTE, self.sent)

    def run(
        self, device: Device, deliver: bool = False, fetch: bool = True, meanwhile: Callable[[], None] | None = None
    ) -> None:
        """Compute, let the result leave by one way or both, and wait for it; the host does something meanwhile."""
        self.launch()
        device.record(self.computed, Way.COMPUTE)
        device.behind(Way.OUT, self.computed)
        if deliver and self.deliver is not None:
            self.deliver()
        if fetch:
            device.transfer(Way.OUT, self.result, self.made)
        device.record(self.fetched, Way.OUT)
        if meanwhile is not None:
            meanwhile()
        device.wait(self.fetched)


class CudaExecutor(InThisProcess):
    """Runs one call at a time. States stay in `pool`, which executors share; `memory` knows what of the host's is
    locked, if anything is. New events are computed `together` with those of other executors."""

    def __init__(
        self,
        model: CudaModel,
        pool: StatePool,
        device: Device,
        memory: PinnedMemory | None = None,
        together: EventsTogether | None = None,
    ) -> None:
        self._model, self._device, self._pool, self._shape = model, device, pool, pool.shape
        self._memory, self._together = memory, together
        self._scoring: dict[Bucket, _Prepared] = {}
        self._encoding: dict[Bucket, _Prepared] = {}
        self._type: np.dtype[np.generic] = np.dtype(HOST_TYPES[pool.shape.dtype])
        self._over = device.event()
        self._arriving: Arrivals | None = None
        self._made: list[PlacedState] = []

    def encode(self, history: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        """The state of a history (B = 1), in new arrays or in those of the caller."""
        return self._compute(NewEvents(history, into))

    def extend(self, state: UserState, new: Mapping[str, Array]) -> Mapping[str, Array]:
        """What A new events a block add to a state."""
        return self._compute(NewEvents(new, known=state))

    def encode_all(
        self, histories: Sequence[Mapping[str, Array]], into: Sequence[Mapping[str, Array] | None]
    ) -> list[Mapping[str, Array]]:
        """The states of several users, each B = 1, in one call."""
        made = [self._empty(history) if own is None else own for history, own in zip(histories, into, strict=True)]
        lengths = [history["history_length"][0] for history in histories]
        homes = [self._home(own["keys_values"], whole) for own, whole in zip(made, lengths, strict=True)]

        def finish() -> None:
            for history, own, whole in zip(histories, made, lengths, strict=True):
                own["times"][...], own["lengths"][...] = history["history_time"], whole
                for block, length in enumerate(whole.tolist()):
                    own["keys_values"][0, block, :, :, length:] = 0

        fresh = self._new_tokens(histories, [None] * len(histories), homes, finish)
        self._hand_out(fresh, made, lengths, homes)
        return made

    def extend_all(self, states: Sequence[UserState], news: Sequence[Mapping[str, Array]]) -> list[Mapping[str, Array]]:
        """What new events add to the states of several users, each B = 1, in one call."""
        homes = [None] * len(states)
        fresh = self._new_tokens(news, states, homes)
        made: list[Mapping[str, Array]] = [self._empty(new) for new in news]
        counts = [new["history_length"][0] for new in news]
        self._hand_out(fresh, made, counts, homes)
        for state, new, own in zip(states, news, made, strict=True):
            own["times"][...] = new["history_time"]
            own["lengths"][...] = state.arrays["lengths"] + new["history_length"]
        return made

    def compute_all(self, users: Sequence[NewEvents]) -> list[Mapping[str, Array]]:
        """One of these two, which is the same for all of them."""
        events, states = [one.events for one in users], [one.known for one in users if one.known is not None]
        return self.extend_all(states, events) if states else self.encode_all(events, [one.into for one in users])

    def made_last(self) -> list[PlacedState]:
        """Where the states lie that were made last; they are the caller's to keep."""
        made, self._made = self._made, []
        return made

    def keep(self, mark: bytes) -> None:
        """What was made last stays in the pool under its mark."""
        self.keep_all([mark])

    def keep_all(self, marks: Sequence[bytes]) -> None:
        """The same for several users."""
        for made, mark in zip(self._made, marks, strict=True):
            self._pool.name(made, mark)
        self._made = []

    def score(self, states: Sequence[UserState], candidates: Mapping[str, Array]) -> Float32Array:
        """Logits (B, C, K) of all candidate rows, padding included; a copy. One state for each of the B users."""
        users, count = candidates["candidate_item"].shape
        if count == 0:
            return np.zeros((users, 0, self._model.weights.num_tasks), np.float32)
        if users > (most := self._pool.most_users):
            parts = [slice(start, start + most) for start in range(0, users, most)]
            return np.concatenate(
                [self.score(states[p], {name: array[p] for name, array in candidates.items()}) for p in parts]
            )
        lengths = np.array([state.arrays["lengths"][0] for state in states], np.int32)
        check_lengths(self._shape, lengths)
        check_types(self._type, states)
        with self._device.running():
            prepared = self._prepared(self._scoring, Bucket.of(users * count, users), self._prepare_score)
            with self._held(states, lengths) as placed:
                write_table(prepared.staging.host, placed, lengths)
                write_candidates(prepared.staging.host, candidates, self._model.block)
                prepared.send(self._device)
                self._bring(placed, states)
                prepared.run(self._device)
        logits: Float32Array = prepared.result[0, : users * count].numpy().reshape(users, count, -1).copy()
        return logits

    def _compute(self, user: NewEvents) -> Mapping[str, Array]:
        """What comes of a user's new events, with others or alone."""
        if self._together is None:
            return self.compute_all([user])[0]
        self._forget()
        with self._device.running():  # whoever is asked first for a room is at warm-up
            for users in sizes_of(user.room):
                self._prepared(self._encoding, Bucket.of(users * user.room, users), self._prepare_history)
        made, placed = self._together.compute(self, user)
        self._made = [placed]
        return made

    def _new_tokens(
        self,
        histories: Sequence[Mapping[str, Array]],
        states: Sequence[UserState | None],
        homes: Sequence[Array | None],
        meanwhile: Callable[[], None] | None = None,
    ) -> Array:
        """Keys and values (N, L, 2, R, A) of new events, users one after the other; valid until the next call. Of users
        who have a home they are there, and not in what is returned."""
        self._forget()
        straight = [home is not None for home in homes]
        new = np.concatenate([history["history_length"] for history in histories])
        known = np.array([[0] * self._shape.blocks if s is None else s.arrays["lengths"][0] for s in states], np.int32)
        check_lengths(self._shape, known + new)
        check_types(self._type, [state for state in states if state is not None])
        rooms = sum(
            history["history_time"].shape[2] for history in histories
        )  # as warm-up has them, whatever is in them
        bucket = Bucket.of(rooms, len(histories))
        with self._device.running():
            prepared = self._prepared(self._encoding, bucket, self._prepare_history)
            with self._grown(states, known, known + new) as placed:
                write_table(prepared.staging.host, placed, known)
                write_events(prepared.staging.host, histories, self._model.block)
                write_homes(prepared.staging.host, homes)
                prepared.send(self._device)
                self._bring(placed, states)
                prepared.run(self._device, any(straight), not all(straight), meanwhile)
        if self._model.dtype is torch.bfloat16:
            halves: Array = prepared.result.view(torch.int16).numpy().view(np.uint16)
            return halves
        fresh: Array = prepared.result.numpy()
        return fresh

    @contextmanager
    def _held(self, states: Sequence[UserState], lengths: Array) -> Iterator[list[PlacedState]]:
        """Where states are or will be, while a call reads them."""
        whole = [tuple(one) for one in lengths.tolist()]
        placed = self._pool.hold([(state.mark, one) for state, one in zip(states, whole, strict=True)])
        try:
            yield placed
        except BaseException:
            self._give_back(placed)
            raise
        self._pool.release(placed, True)

    @contextmanager
    def _grown(self, states: Sequence[UserState | None], known: Array, whole: Array) -> Iterator[list[PlacedState]]:
        """Where states are that grow, and their new tokens will be; what came of it is named or forgotten later."""
        marks = [b"" if state is None else state.mark for state in states]
        sizes = [[tuple(one) for one in lengths.tolist()] for lengths in (known, whole)]
        placed = self._pool.grow(list(zip(marks, *sizes, strict=True)))
        try:
            yield placed
        except BaseException:
            self._give_back(placed)
            raise
        self._pool.settle(placed, sizes[1])
        self._made = placed

    def _give_back(self, placed: Sequence[PlacedState]) -> None:
        """A call has failed: what it launched may use its pages, and arrays of the host, until it is through."""
        for way in Way:
            self._device.record(self._over, way)
            self._device.wait(self._over)
        self._pool.release(placed, False)

    def _forget(self) -> None:
        made, self._made = self._made, []
        for one in made:
            self._pool.forget(one)

    def _bring(self, placed: Sequence[PlacedState], states: Sequence[UserState | None]) -> None:
        """Send what is not there, each state once."""
        assert self._arriving is not None  # noqa: S101 - whatever is prepared has it
        lacking = {one: state for one, state in zip(placed, states, strict=True) if not one.there and any(one.lengths)}
        self._arriving.bring([(state.arrays, one) for one, state in lacking.items() if state is not None])

    def _empty(self, history: Mapping[str, Array]) -> dict[str, Array]:
        """New arrays for what a history's tokens become."""
        return empty_state(self._model.specs, history["history_time"].shape[2], self._model.state_type)

    def _home(self, keys_values: Array, lengths: Array) -> Array | None:
        """An array (1, N, L, 2, T, A), if the GPU can write so many tokens of each block into it."""
        shape = self._shape
        fits = keys_values.dtype == self._type and keys_values.shape[4] >= lengths.max(initial=0)
        fits = fits and keys_values.shape[:4] == (1, shape.blocks, shape.layers, 2)
        return keys_values if fits and self._memory is not None and self._memory.holds(keys_values) else None

    def _hand_out(
        self, fresh: Array, made: Sequence[Mapping[str, Array]], counts: Sequence[Array], homes: Sequence[Array | None]
    ) -> None:
        """Copy each user's rows of `fresh` into what was made for him, unless they are there."""
        first = np.zeros(self._shape.blocks, np.int64)
        for own, home, each in zip(made, homes, counts, strict=True):
            if home is None:
                for block, (start, count) in enumerate(zip(first.tolist(), each.tolist(), strict=True)):
                    own["keys_values"][0, block, :, :, :count] = fresh[block, :, :, start : start + count]
            first += each

    def _prepared(
        self, known: dict[Bucket, _Prepared], bucket: Bucket, prepare: Callable[[Bucket], _Prepared]
    ) -> _Prepared:
        if self._arriving is None:
            self._arriving = Arrivals(self._device, self._pool, self._memory)
        found = known.get(bucket)
        if found is None:
            found = known[bucket] = prepare(bucket)
        return found

    def _prepare_score(self, bucket: Bucket) -> _Prepared:
        model, device = self._model, self._device
        staging = CallStaging(device, score_sections(model.schema, self._shape, bucket.rows, bucket.users, model.block))
        steps = ScoreSteps(device, model.weights, self._pool, staging.there, model.block)
        return self._recorded(bucket, staging, steps, steps.logits)

    def _prepare_history(self, bucket: Bucket) -> _Prepared:
        model, device = self._model, self._device
        staging = CallStaging(
            device, history_sections(model.schema, self._shape, bucket.rows, bucket.users, model.block)
        )
        steps = HistorySteps(device, model.weights, self._pool, staging.there, model.block)
        prepared, there = self._recorded(bucket, staging, steps, steps.fresh), staging.there
        if self._memory is None:
            return prepared
        homes = Homes(there["homes"], there["apart"], there["tiles"])
        return replace(prepared, deliver=device.captured(partial(deliver_rows, steps.fresh, homes), Way.OUT))

    def _recorded(self, bucket: Bucket, staging: CallStaging, launch: Callable[[], None], made: Tensor) -> _Prepared:
        device = self._device
        result = device.pinned(made.nbytes).view(made.dtype).view(made.shape)
        sent, computed, fetched = (device.event() for _ in range(3))
        staging.host["tiles"][..., 0] = NOBODY
        with self._nobodys(bucket.users if device.measures else 0) as pages:
            if device.measures:
                write_whole(staging.host, self._shape.longest, bucket, self._model.block, pages)
            staging.send()
            device.record(sent, Way.IN)
            device.wait(sent)
            replay = device.captured(launch)
        return _Prepared(staging, replay, made, result, sent, computed, fetched)

    @contextmanager
    def _nobodys(self, users: int) -> Iterator[list[int]]:
        """Pages for as many users' longest states, or as many as there are."""
        shape = self._shape
        longest = (shape.longest,) * shape.blocks
        placed = self._pool.hold([(b"", longest)] * min(users, self._pool.most_users))
        try:
            yield [page for one in placed for pages in one.pages for page in pages]
        finally:
            self._pool.release(placed, False)
