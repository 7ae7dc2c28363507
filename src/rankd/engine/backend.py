"""The protocol between the request path and whatever computes: a Backend makes Executors, an Executor runs one call.

In: named arrays, padded to warmed shapes. Out: the state of a history, then logits. `targets.py` knows the backends
there are; the schedule and the states know this file alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Protocol, runtime_checkable

import msgspec
from msgspec import Meta

from rankd.engine import thread_plan
from rankd.engine.thread_plan import ThreadPlan, unpinned
from rankd.engine.topology import Topology, read_topology
from rankd.types import Allocate, Array, Float32Array, UserState

if TYPE_CHECKING:
    from rankd.observe.state_metrics import GpuCounts

log = logging.getLogger("rankd")
MOST_IN_FLIGHT = 3
"""Calls that one executor of a GPU can have under way: one that is sent, one that is computed, one that comes back."""


class Precision(Enum):
    """Arithmetic of the compiled graphs. AUTO is what the artifact was built for, if this processor has it. INT8 is of
    products with weights; the rest is in bfloat16 where the processor has it, else in float32."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"


class StateType(Enum):
    """How an engine hands out the floats of a state: float32, or bfloat16 as uint16 (the upper half of float32)."""

    FP32 = "fp32"
    BF16 = "bf16"


class Pinning(Enum):
    """Whether executors' threads are bound to cpus. AUTO follows `thread_plan.py`: often not at all."""

    AUTO = "auto"
    OFF = "off"


class Isolation(Enum):
    """Where executors are: on threads of this process, or each in a process of its own, so that an engine that crashes
    or hangs takes one call with it and nothing else (`processes/`)."""

    THREADS = "threads"
    PROCESSES = "processes"


class GpuStorage(Enum):
    """How states lie in GPU memory. AUTO is the type that the engine computes with; FP8 is e4m3 with a scale for each
    token and head: a byte a number."""

    AUTO = "auto"
    FP8 = "fp8"


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a model is computed. 0 executors: one for each physical core that this process may use and has the time for
    (`thread_plan.default_executors`); threads are those of one call. OpenVINO packs weights for each executor by itself
    as long as the copies take no more than `weight_copies_mib`; with `static_shapes` then also for the shapes of calls,
    which takes .3 s a shape at the start and makes calls quicker by a tenth to a half. A history is encoded on
    `encode_threads` threads (0: one for each executor) while nothing else is computed, if that was measured to pay.

    `target` "auto" is the one that `rankd bench engine` found the fastest on this machine. `fall_back` is the target to
    take where `target` cannot be had, for want of a GPU or of its memory; "" for none: then the start is refused.

    `mix` are several targets that serve a version together, in place of `target`, `executors` and `threads`: each
    "target:executors" or "target:executors x threads", without spaces (`mixed_targets.py`).

    On a GPU (docs/gpu.md) states stay in up to `gpu_state_mib` of its memory, as `gpu_storage` has them; 0: they travel
    with each call. Each executor has `calls_in_flight` calls under way; 0: as many as were measured to pay.
    """

    target: str = "auto"
    precision: Precision = Precision.AUTO
    executors: int = 0
    threads: int = 1
    encode_threads: Annotated[int, Meta(ge=0)] = 0
    pinning: Pinning = Pinning.AUTO
    isolation: Isolation = Isolation.THREADS
    weight_copies_mib: Annotated[int, Meta(ge=0)] = 1024
    static_shapes: bool = False
    fall_back: str = ""
    mix: tuple[str, ...] = ()
    gpu_state_mib: Annotated[int, Meta(ge=0)] = 4096
    gpu_storage: GpuStorage = GpuStorage.AUTO
    calls_in_flight: Annotated[int, Meta(ge=0, le=MOST_IN_FLIGHT)] = 0

    def plan(self, topology: Topology) -> ThreadPlan:
        """The cpus of its executors, where they are pinned at all."""
        return thread_plan.plan(topology, self.executors, self.threads)

    def wide_threads(self, num_executors: int) -> int:
        """How many threads a history may be encoded on while nothing else is computed."""
        return self.encode_threads or num_executors * self.threads


def plan_threads(config: EngineConfig, by_node: bool = False) -> ThreadPlan:
    """How many executors there are on this machine and where their threads run, which is logged.

    `by_node` is for an engine whose threads can be held to a node but not to a core.
    """
    chosen = config.plan(read_topology())
    if config.pinning is Pinning.OFF:
        chosen = unpinned(chosen.num_executors, 'engine.pinning is "off"')
    elif by_node:
        chosen = chosen.by_node()
    log.info("%s", chosen.describe())
    return chosen


class GpuStates(Protocol):
    """User states that an engine keeps in memory of its own, by their marks (`UserState.mark`). Thread-safe."""

    def has(self, mark: bytes) -> bool:
        """Whether a call with this state would find it there, as things are."""
        ...

    def counts(self) -> GpuCounts:
        """A snapshot."""
        ...


class InThisProcess:
    """What backends and executors have in common that compute in this process, in its own memory."""

    host_memory: Allocate | None = None
    gpu_states: GpuStates | None = None
    speed: tuple[float, ...] | None = None
    encode_wide = False

    def keep(self, mark: bytes) -> None:
        """Whoever called has the state; here nothing is left of it."""

    def close(self) -> None:
        """Memory goes with the last reference; a call that is under way cannot be ended."""


class Executor(Protocol):
    """One compiled instance with buffers of its own; it runs one call at a time, on one thread.

    `encode_wide` may be set between calls: histories are then encoded on `EngineConfig.encode_threads` threads, which
    the caller sees to that nobody else needs. An engine that cannot takes no notice.
    """

    encode_wide: bool

    def encode(self, history: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        """The state arrays of a history (B = 1): new ones, or `into` filled.

        For a model without a state of its own it is the history.
        """
        ...

    def extend(self, state: UserState, new: Mapping[str, Array]) -> Mapping[str, Array]:
        """What A new events a block add to a state (B = 1), named as the state is.

        Arrays with a T dimension hold the A new tokens alone, the others are whole. They belong to this executor until
        its next call. Only where the model can (`Manifest.extends`).
        """
        ...

    def keep(self, mark: bytes) -> None:
        """What the last `encode` or `extend` led to is the state of this mark (`UserState.mark`): an engine that still
        has it in memory of its own may keep it there, and read nothing of the arrays of a state that is so marked."""
        ...

    def score(self, states: Sequence[UserState], candidates: Mapping[str, Array]) -> Float32Array:
        """Logits (B, C, K) of all candidate rows, padding included; a copy. One state for each of the B users."""
        ...

    def close(self) -> None:
        """It is not used any more, from whichever thread that is said. A call that is under way, since it hangs, ends
        with EngineFailure if it can be ended."""
        ...


@runtime_checkable
class JointExecutor(Executor, Protocol):
    """One that computes new events of several users (each B = 1) in one call, too."""

    def encode_all(
        self, histories: Sequence[Mapping[str, Array]], into: Sequence[Mapping[str, Array] | None]
    ) -> list[Mapping[str, Array]]:
        """`encode` of each."""
        ...

    def extend_all(self, states: Sequence[UserState], news: Sequence[Mapping[str, Array]]) -> list[Mapping[str, Array]]:
        """`extend` of each."""
        ...

    def keep_all(self, marks: Sequence[bytes]) -> None:
        """`keep` of each."""
        ...


class Backend(Protocol):
    """An artifact compiled for a target. `host_memory` makes memory that its executors read and write in place; None:
    they do so with any. `gpu_states` are those that it keeps where it computes, if it does. `speed` is how much 1, 2,
    ... `num_executors` executors get done that compute at once, in units of one alone, as measured: from 1 on, it falls
    nowhere, and n get done at most n times as much. None: they are independent, n get done n times as much."""

    target: str
    precision: Precision
    state_type: StateType
    plan: ThreadPlan
    num_executors: int
    host_memory: Allocate | None
    gpu_states: GpuStates | None
    speed: tuple[float, ...] | None

    def executor(self) -> Executor:
        """A new executor; at most `num_executors` are in use at once. The first one made is the plan's first, and so on
        around.
        """
        ...

    def memory_bytes(self) -> int:
        """Bytes of weights that the compiled graphs hold."""
        ...

    def close(self) -> None:
        """Nothing of it is used any more."""
        ...
