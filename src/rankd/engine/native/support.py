"""Whether the native engine suits a model, this processor and this installation. Imports nothing heavy."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankd.features.schema import FeatureSchema

NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512_bf16")
CPUINFO = Path("/proc/cpuinfo")


def why_not(options: Mapping[str, Any], schema: FeatureSchema, model: str = "climber") -> str | None:
    """What stands against it, by name; None if nothing does. `options` are those of models.climber.Climber."""
    if model != "climber":
        return f"the model is {model!r}; only climber is written out"
    return machine_lacks() or _sizes(options, schema)


def machine_lacks() -> str | None:
    """What this processor lacks for any model; None if nothing."""
    if platform.machine() != "x86_64":
        return f"the processor is {platform.machine()}; x86_64 is needed"
    try:
        flags = set(CPUINFO.read_text().partition("flags")[2].partition("\n")[0].split())
    except OSError:
        return f"{CPUINFO} cannot be read, so the processor is not known"
    missing = [flag for flag in NEEDED if flag not in flags]
    return f"the processor has no {', '.join(missing)}" if missing else None


def _sizes(options: Mapping[str, Any], schema: FeatureSchema) -> str | None:
    width, heads = int(options.get("width", 64)), int(options.get("heads", 4))
    blocks = schema.num_sub_sequences
    sizes = {
        "width": width,
        "width x ffn_ratio": width * int(options.get("ffn_ratio", 4)),
        "hidden": int(options.get("hidden", 128)),
        "width x blocks / 4": width * blocks // 4,
    }
    if width // heads % 16:
        return f"width / heads is {width // heads}, which is no multiple of 16"
    for name, size in sizes.items():
        if size % 32:
            return f"{name} is {size}, which is no multiple of 32"
    if len(schema.tasks) > 32:
        return f"{len(schema.tasks)} tasks; at most 32"
    return None
