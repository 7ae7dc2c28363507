"""Several targets that serve one model version together: `engine.mix`, and the backend that holds their backends.

In: an EngineConfig with a mix. Out: a configuration for each of its targets, then a `MixedBackend` of what `targets.py`
loaded for these. What one target computes the others go on with: a user's state, parts of a list. So all of them keep
states of the same type, and compute in the same precision; what does not is refused.

    mix = ["openvino:1", "onnxruntime:2x1"]     one executor, and two of one thread each
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rankd.engine import thread_plan
from rankd.engine.backend import Backend, EngineConfig, Executor, GpuStates, Isolation, Precision, StateType
from rankd.engine.thread_plan import ThreadPlan
from rankd.engine.topology import Topology, read_topology
from rankd.errors import ConfigError
from rankd.types import Allocate

PART = re.compile(r"(?P<target>\w+):(?P<executors>[1-9]\d*)(x(?P<threads>[1-9]\d*))?")
OFF_CPU = ("cuda",)
"""Targets whose executors compute elsewhere: their threads wait."""


class PartConfig(EngineConfig, frozen=True):
    """The configuration of one target of a mix: of `together` executors, of at most `most_threads` threads, its own
    come after `before` others."""

    before: int = 0
    together: int = 0
    most_threads: int = 1

    def plan(self, topology: Topology) -> ThreadPlan:
        """Its part of the plan of all."""
        return thread_plan.plan(topology, self.together, self.most_threads).part(self.before, self.executors)


class MixedBackend:
    """The backends of several targets, compiled from one artifact: `kinds`, each with executors of its own."""

    def __init__(self, kinds: Sequence[Backend]) -> None:
        """
        Raises:
            ConfigError: they keep states of different types.
        """
        types = {kind.target: kind.state_type.value for kind in kinds}
        if len(set(types.values())) > 1:
            given = ", ".join(f"{one} on {target}" for target, one in types.items())
            raise ConfigError(
                f"engine.mix: states are {given}; targets of a mix keep them in the same type: set states.storage to "
                "one that all of them have, or leave one out"
            )
        self.kinds = tuple(kinds)
        self.target = " + ".join(f"{kind.target}:{kind.num_executors}" for kind in kinds)
        self.precision: Precision = kinds[0].precision
        self.state_type: StateType = kinds[0].state_type
        self.num_executors = sum(kind.num_executors for kind in kinds)
        cpus, nodes = ([one for kind in kinds for one in getattr(kind.plan, name)] for name in ("cpus", "nodes"))
        self.plan = ThreadPlan(tuple(cpus), tuple(nodes), kinds[0].plan.reason)
        self.host_memory: Allocate | None = next((kind.host_memory for kind in kinds if kind.host_memory), None)
        self.gpu_states: GpuStates | None = next((kind.gpu_states for kind in kinds if kind.gpu_states), None)
        self.speed: tuple[float, ...] | None = None  # each kind has its own
        self._made = 0

    def executor(self) -> Executor:
        """A new executor, of each kind in turn as many as it has."""
        numbers = [kind for kind in self.kinds for _ in range(kind.num_executors)]
        self._made += 1
        return numbers[(self._made - 1) % len(numbers)].executor()

    def memory_bytes(self) -> int:
        """Bytes of weights of all kinds."""
        return sum(kind.memory_bytes() for kind in self.kinds)

    def close(self) -> None:
        """Nothing of it is used any more."""
        for kind in self.kinds:
            kind.close()


def kinds_of(backend: Backend) -> tuple[Backend, ...]:
    """The backends whose executors are alike: of a mix its own, else it alone."""
    return backend.kinds if isinstance(backend, MixedBackend) else (backend,)


def parts_of(config: EngineConfig) -> tuple[PartConfig, ...]:
    """A configuration for each target of a mix.

    Raises:
        ConfigError: fewer than two targets, one twice, text of another form, or settings that a mix has no use for.
    """
    given = ", ".join(config.mix)
    found = [PART.fullmatch(text.strip()) for text in config.mix]
    for text, one in zip(config.mix, found, strict=True):
        if one is None:
            raise ConfigError(
                f"engine.mix: '{text}' is not target:executors or target:executorsxthreads, like openvino:1 or "
                "onnxruntime:2x1, with at least one of each"
            )
    targets = [one["target"] for one in found if one]
    if len(targets) < 2 or len(set(targets)) < len(targets):
        raise ConfigError(
            f"engine.mix: {given} is given; it takes two targets or more, each once. For one target set engine.target, "
            "engine.executors and engine.threads"
        )
    plain = EngineConfig()
    beside = [name for name in ("target", "executors", "fall_back") if getattr(config, name) != getattr(plain, name)]
    if beside:
        raise ConfigError(f"engine.{beside[0]} is given beside engine.mix = {given}, which says all of it: give one")
    if config.isolation is not Isolation.THREADS:
        raise ConfigError(
            "engine.isolation: executors of a mix share states in this process's memory, so they are on its threads; "
            'set it to "threads", or serve one target'
        )
    executors = [int(one["executors"]) for one in found if one]
    threads = [int(one["threads"] or config.threads) for one in found if one]
    common = {name: getattr(config, name) for name in config.__struct_fields__} | {"mix": ()}
    return tuple(
        PartConfig(
            **common
            | {"target": target, "executors": executors[number], "threads": threads[number]}
            | {"before": sum(executors[:number]), "together": sum(executors), "most_threads": max(threads)}
        )
        for number, target in enumerate(targets)
    )


def check_threads(parts: Sequence[PartConfig]) -> None:
    """Refuse a mix whose executors would take each other's cores: what a call takes is measured for each by itself.

    Raises:
        ConfigError: more threads than cpus.
    """
    allowed = len(read_topology().allowed)
    wanted = sum(part.executors * part.threads for part in parts if part.target not in OFF_CPU)
    if wanted > allowed:
        raise ConfigError(
            f"engine.mix: its executors have {wanted} threads, and this process may use {allowed} cpus; what calls "
            "take could not be predicted. Take fewer executors or threads"
        )
