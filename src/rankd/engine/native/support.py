"""Whether the native engine suits a model, this processor and this installation. Imports nothing heavy."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankd.engine.even_layers import why_uneven
from rankd.features.schema import FeatureSchema

NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512_bf16")
AMX, WIDE = "amx_bf16", 256
"""With this, OpenVINO multiplies several times as fast as AVX512-BF16 does; from this width on that decides."""
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
        flags = _flags()
    except OSError:
        return f"{CPUINFO} cannot be read, so the processor is not known"
    missing = [flag for flag in NEEDED if flag not in flags]
    return f"the processor has no {', '.join(missing)}" if missing else None


def outdone(options: Mapping[str, Any]) -> bool:
    """Whether OpenVINO in bfloat16 is the quicker one on this processor, as far as is known without measuring."""
    return int(options.get("width", 64)) >= WIDE and AMX in _flags()


def _flags() -> set[str]:
    return set(CPUINFO.read_text().partition("flags")[2].partition("\n")[0].split())


def _sizes(options: Mapping[str, Any], schema: FeatureSchema) -> str | None:
    width, heads = int(options.get("width", 64)), int(options.get("heads", 4))
    blocks, shape = schema.num_sub_sequences, options.get("shape")
    if shape is not None and (reason := _uneven(shape, width, heads, blocks)):
        return reason
    sizes = {
        "width": width,
        "feed-forward": shape["blocks"][0][0]["ffn"] if shape else width * int(options.get("ffn_ratio", 4)),
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


def _uneven(shape: Mapping[str, Any], width: int, heads: int, blocks: int) -> str | None:
    """What of a shape (see `models.layer_shapes.ClimberShape`) is not as in a plain model; ffn may have any size."""
    if reason := why_uneven(shape):
        return reason
    layer, attention = shape["blocks"][0][0], {"heads": heads, "head_width": width // heads}
    if any(layer[name] != size or shape["fusion"][name] != size for name, size in attention.items()):
        return f"its attention is not {heads} heads of {width // heads} in every layer and in the fusion"
    if shape["fusion"]["gate"] != width * blocks // 4:
        return f"the gate of its fusion has {shape['fusion']['gate']} neurons, not {width * blocks // 4}"
    return None
