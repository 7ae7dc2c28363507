"""Whether a pruned Climber still has layers that are all alike, as engines with kernels of their own want them.

In: a model's `shape` (`models.layer_shapes.ClimberShape`). Out: what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def why_uneven(shape: Mapping[str, Any]) -> str:
    """Why not every layer has weights of its own and of the same sizes; empty if they do."""
    layers = [layer for block in shape["blocks"] for layer in block]
    if shape.get("repeats", 1) != 1:
        return f"its layers are shared {shape['repeats']} times; every layer needs weights of its own"
    if len({len(block) for block in shape["blocks"]}) > 1 or any(layer != layers[0] for layer in layers):
        return "its layers are of unequal sizes; prune with uniform = true"
    if any(size for name, size in layers[0].items() if name.endswith("_rank")):
        return "its projections are of low rank"
    return ""
