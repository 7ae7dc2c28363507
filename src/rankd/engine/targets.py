"""The targets there are, and which one, or which several, a configuration means. The only file that knows all backends
by name."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from rankd.artifact import Artifact
from rankd.engine.backend import Backend, EngineConfig, Isolation, Precision, StateType
from rankd.engine.cuda import gpu_presence
from rankd.engine.machine_choice import fastest_target
from rankd.engine.mixed_targets import MixedBackend, check_threads, parts_of
from rankd.engine.native import support as native
from rankd.errors import ArtifactError, ConfigError, EngineFailure, nearest
from rankd.features.schema import FeatureSchema

log = logging.getLogger("rankd")
TARGETS = {
    "cuda": ("rankd.engine.cuda.cuda_backend", "CudaBackend"),
    "native": ("rankd.engine.native_backend", "NativeBackend"),
    "openvino": ("rankd.engine.openvino_backend", "OpenVinoBackend"),
    "onnxruntime": ("rankd.engine.onnxruntime_backend", "OnnxRuntimeBackend"),
    "reference": ("rankd.engine.reference_backend", "ReferenceBackend"),
}
PRECISIONS = {
    "cuda": (Precision.FP32, Precision.BF16),
    "native": (Precision.BF16,),
    "openvino": (Precision.FP32, Precision.BF16, Precision.INT8),
    "onnxruntime": (Precision.FP32,),
    "reference": (Precision.FP32,),
}
"""What each target computes in, where the processor has it."""
OWN_GRAPHS = (Precision.INT8,)
"""Precisions whose graphs are others: what is built for one of them is served in it alone."""
READ_IDS = ("cuda", "native", "reference")
"""Targets that look rows up by themselves, so that no table can be beside the graph."""

AUTO = "auto"


def check_target(target: str) -> None:
    """Refuse a target that there is not.

    Raises:
        ConfigError: with the nearest one.
    """
    if target not in TARGETS:
        raise ConfigError(f"unknown target '{target}'; there is: {', '.join(TARGETS)}.{nearest(target, TARGETS)}")


def float_precision(*targets: str) -> Precision:
    """Bfloat16 where all of these compute in it on this machine, else float32."""
    return Precision.FP32 if any(why_not(target, Precision.BF16) for target in targets) else Precision.BF16


def why_not(target: str, precision: Precision) -> str:
    """Why a target cannot compute in a precision here; empty if it can."""
    reason: str = _module(target).why_not(precision)
    return reason


def why_not_model(target: str, model: str, options: Mapping[str, Any], schema: FeatureSchema) -> str:
    """Why a target cannot run a model on this machine, whatever the precision; empty if it can.

    `model` is a name of `models.protocol`, `options` are those of its constructor.
    """
    if schema.embedded and target in READ_IDS:
        return f"the target {target} computes with the tables in the graph; build without --tables"
    if target == "cuda":
        return gpu_presence.why_not_model(model, options, schema)
    return native.why_not(options, schema, model) or "" if target == "native" else ""


def built_together(target: str, precision: Precision) -> tuple[Precision, ...]:
    """The precisions in which a target computes the graphs that are built for one of them."""
    if precision in OWN_GRAPHS:
        return (precision,)
    return tuple(one for one in PRECISIONS[target] if one not in OWN_GRAPHS)


def runs_here(target: str) -> bool:
    """Whether a target computes in any precision on this machine."""
    return any(not why_not(target, precision) for precision in PRECISIONS[target])


def load_backend(artifact: Artifact, config: EngineConfig, state_type: StateType | None = None) -> Backend:
    """Compile an opened artifact for the configured target. `state_type` None: that of the precision.

    Where that cannot be done here and `config.fall_back` names a target, that one is taken, and the reason is logged.
    With `config.mix` it is compiled for several, and the backend is a `MixedBackend`.

    Raises:
        ConfigError: no such target, a GPU with too little memory, or a mix of what does not go together.
        ArtifactError: the artifact was not built for that target or precision, or its graphs do not compile here.
    """
    if config.mix:
        return _load_mix(artifact, config, state_type)
    if not config.fall_back:
        return _load(artifact, config, state_type)
    check_target(config.fall_back)
    try:
        return _load(artifact, config, state_type)
    except (ArtifactError, ConfigError, EngineFailure) as error:
        log.warning("engine.fall_back: %s takes the place of %s: %s", config.fall_back, config.target, error)
    return _load(artifact, msgspec.structs.replace(config, target=config.fall_back, fall_back=""), state_type)


def served_precision(artifact: Artifact, config: EngineConfig) -> Precision:
    """The precision in which an artifact is served as configured, by the first target of a mix.

    Raises:
        ArtifactError, ConfigError: it cannot be.
    """
    return _precision(artifact, choose_target(artifact, config), config)


def _load(artifact: Artifact, config: EngineConfig, state_type: StateType | None) -> Backend:
    target = choose_target(artifact, config)
    record, path = artifact.manifest.engines[target], artifact.path
    precision = _precision(artifact, target, config)
    reason = why_not(target, precision)
    if reason:
        raise ArtifactError(f"{path} cannot be served by {target} in {precision.value}: {reason}")
    if precision.value not in record.parity:
        raise ArtifactError(
            f"{path} was checked for the precisions {', '.join(record.parity)} on {target}, not for {precision.value}"
        )
    if not artifact.manifest.split:
        state_type = StateType.FP32  # its state is the history itself, as it came
    if config.isolation is Isolation.PROCESSES:
        from rankd.engine.processes.process_backend import ProcessBackend

        chosen = msgspec.structs.replace(config, target=target, precision=precision)
        return ProcessBackend(artifact, chosen, state_type)
    module, name = TARGETS[target]
    kind = getattr(importlib.import_module(module), name)
    backend: Backend = kind.load(artifact, config, precision, state_type or _own_state_type(target, precision))
    return backend


def _load_mix(artifact: Artifact, config: EngineConfig, state_type: StateType | None) -> MixedBackend:
    """All targets of a mix, in one precision: states, parts and scores of one are good for the others."""
    parts = parts_of(config)
    for part in parts:
        check_target(part.target)
    check_threads(parts)
    wanted = {part.target: _precision(artifact, choose_target(artifact, part), part) for part in parts}
    if len(set(wanted.values())) > 1:
        checked = _checked_in_all(artifact, wanted)
        common = [one for one in checked if not any(why_not(target, one) for target in wanted)]
        advice = f'set engine.precision = "{common[0].value}"' if common else "no precision is common to them"
        raise ConfigError(
            f"engine.mix: {', '.join(f'{target} would compute in {one.value}' for target, one in wanted.items())}; "
            f"targets of a mix compute in the same: {advice}"
        )
    backends = list[Backend]()
    try:
        for part in parts:
            backends.append(_load(artifact, part, state_type))
        return MixedBackend(backends)
    except BaseException:
        for backend in backends:
            backend.close()
        raise


def _checked_in_all(artifact: Artifact, targets: Mapping[str, object]) -> list[Precision]:
    """The precisions for which an artifact was checked on all of these targets."""
    checked = [artifact.manifest.engines[target].parity for target in targets]
    return [one for one in Precision if all(one.value in parity for parity in checked)]


def _own_state_type(target: str, precision: Precision) -> StateType:
    """Bfloat16 where a target computes in it what it does not compute in integers."""
    narrow = precision is Precision.BF16 or (precision is Precision.INT8 and not why_not(target, Precision.BF16))
    return StateType.BF16 if narrow else StateType.FP32


def choose_target(artifact: Artifact, config: EngineConfig) -> str:
    """The configured target; for "auto" the fastest one measured on this machine of those that the artifact has.

    Nothing measured, or nothing of it in the artifact: the first one that it was built for and that runs here, but not
    the native one where OpenVINO in bfloat16 is known to be quicker (`native.support.outdone`).

    Raises:
        ConfigError: no such target. ArtifactError: not built for it.
    """
    built = [target for target in TARGETS if target in artifact.manifest.engines]
    if config.target == AUTO:
        wanted = {target: _precision(artifact, target, config) for target in built}
        usable = {target: precision for target, precision in wanted.items() if not why_not(target, precision)}
        if not usable:
            raise ArtifactError(
                f"{artifact.path} is built for {', '.join(built)}, of which none computes in the wanted precision here"
            )
        return fastest_target(usable) or _first(artifact, usable)
    check_target(config.target)
    if config.target not in built:
        raise ArtifactError(
            f"{artifact.path} was built for {', '.join(built)}, not for {config.target}; "
            f"run `rankd build --target {config.target}`"
        )
    return config.target


def _first(artifact: Artifact, usable: Mapping[str, Precision]) -> str:
    """The first of these targets, or OpenVINO if that is the quicker one on such a processor."""
    first = next(iter(usable))
    if first == "native" and usable.get("openvino") is Precision.BF16 and native.outdone(artifact.manifest.options):
        return "openvino"
    return first


def _precision(artifact: Artifact, target: str, config: EngineConfig) -> Precision:
    """The configured precision; else the one that the artifact is served in, or float32 where that does not run."""
    if config.precision is not Precision.AUTO:
        return config.precision
    record = artifact.manifest.engines[target]
    own = Precision(record.precision)
    return Precision.FP32 if why_not(target, own) and Precision.FP32.value in record.parity else own


def _module(target: str) -> Any:
    return importlib.import_module(TARGETS[target][0])
