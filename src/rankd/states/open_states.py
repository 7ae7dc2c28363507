"""From an artifact, its backend and a configuration to the states of one model version."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from rankd.artifact import MANIFEST, Artifact
from rankd.engine.backend import Backend, StateType
from rankd.states.cache import StateCache
from rankd.states.lending import NoStates, States
from rankd.states.spill import SpillTier
from rankd.states.state_config import MIB, StateConfig, Storage
from rankd.states.storage import StateLayout

ENGINE_TYPE = {Storage.FP32: StateType.FP32, Storage.BF16: StateType.BF16}


def engine_state_type(config: StateConfig) -> StateType | None:
    """In which type an engine should hand out states, so that nothing is converted; None: that of its precision."""
    return ENGINE_TYPE.get(config.storage)


def open_states(artifact: Artifact, backend: Backend, config: StateConfig) -> States:
    """The states of a version; none are kept for a model without a state of its own, or with a budget of 0.

    Raises:
        ConfigError: a budget below one state, or a spill folder that cannot be used.
    """
    manifest = artifact.manifest
    if not manifest.split or config.budget_mib == 0:
        return NoStates()
    layout = StateLayout(manifest.state, backend.state_type, config.storage)
    spill = None
    if config.spill and config.spill_mib:
        about = f"{backend.target} {backend.precision.value} {layout.storage.value}"
        identity = sha256((artifact.path / MANIFEST).read_bytes() + about.encode()).hexdigest()[:16]
        spill = SpillTier(Path(config.spill), manifest.name, manifest.version, identity, config.spill_mib * MIB)
    rooms, extends = manifest.schema.history_buckets, manifest.extends
    memory, gpu = backend.host_memory, backend.gpu_states
    return StateCache(layout, rooms, extends, config, spill, allocate=memory, gpu=gpu)
