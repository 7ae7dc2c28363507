"""Weights as the tiles read them: bfloat16, packed in panels, norms and temperatures folded in, once at load.

In: the state_dict of models.climber.Climber as arrays, float32. Out: `Packed`: addresses, and the arrays behind
them. Next: `native_climber.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankd.engine.native.layout import LayerWeights, Sizes, TopWeights
from rankd.types import Array, Float32Array

LOG2_E = math.log2(math.e)  # softmax takes powers of 2: the factor goes into queries and biases
LINE = 64  # bytes of a cache line, and of a vector
Weights = Mapping[str, Float32Array]


@dataclass(frozen=True)
class Packed:
    """Everything compiled code needs to know of a model. `arrays` keeps the memory alive."""

    sizes: Sizes
    layers: LayerWeights
    top: TopWeights
    arrays: tuple[Array, ...]

    def memory_bytes(self) -> int:
        """Bytes of the packed weights and the embedding tables."""
        return sum(array.nbytes for array in self.arrays)


def aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    """Zeros whose address is a multiple of 64."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    array: Array = memory[start : start + size].view(dtype).reshape(shape)
    return array


def to_bf16(x: Float32Array) -> Array:
    """bfloat16, rounded to even, as uint16."""
    bits: Array = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def panels(weight: Float32Array) -> Array:
    """A weight (out, in) as torch keeps it -> (out / 32, in / 2, 64) bfloat16; see `tiles.py`."""
    out, width = weight.shape
    return (
        to_bf16(weight).reshape(out // 32, 32, width // 2, 2).transpose(0, 2, 1, 3).reshape(out // 32, width // 2, 64)
    )


def distance_table(position: Float32Array) -> Float32Array:
    """(H, X) from position (P + 1, H): distance x stands at column X - 17 - x, so that keys follow from left to right.

    Distances beyond P are as P; X = 2 P + 81 leaves room for what is appended, the last 16 columns are never counted.
    """
    distances = 2 * len(position) + 64
    order = np.minimum(np.arange(distances, -17, -1).clip(min=0), len(position) - 1)
    return np.ascontiguousarray(position[order].T * LOG2_E)


class _Memory:
    """Arrays one after the other in one piece of memory, so that large pages serve them all."""

    def __init__(self) -> None:
        self._arrays: list[Array] = []
        self._offsets: list[int] = []
        self._size = 0

    def put(self, array: Array) -> int:
        """Where the array will be, from the start."""
        self._arrays.append(np.ascontiguousarray(array))
        offset, self._size = self._size, self._size + (array.nbytes + LINE - 1) // LINE * LINE
        self._offsets.append(offset)
        return offset

    def close(self) -> Array:
        """The memory, filled."""
        memory = aligned((self._size + LINE,), np.uint8)
        for array, offset in zip(self._arrays, self._offsets, strict=True):
            memory[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        return memory


def pack(weights: Weights, heads: int) -> Packed:
    """Pack a model. Shapes are those that `support.why_not` lets through."""
    sizes = _sizes(weights, heads)
    memory = _Memory()
    layers = [
        _layer(weights, f"blocks.{n}.stack.{layer}.", heads)
        for n in range(sizes.blocks)
        for layer in range(sizes.layers)
    ]
    stacked = {name: memory.put(np.stack([layer[name] for layer in layers])) for name in LayerWeights._fields}
    top = {name: memory.put(array) for name, array in _top(weights, sizes, heads).items()}
    piece = memory.close()
    tables = [np.ascontiguousarray(weights[f"tokens.{name}.weight"], np.float32) for name in _tables(weights)]
    addresses = dict.fromkeys(TopWeights._fields, 0)
    addresses |= {name: piece.ctypes.data + offset for name, offset in top.items()}
    addresses |= {name: table.ctypes.data for name, table in zip(_tables(weights), tables, strict=True)}
    made = LayerWeights(**{name: piece.ctypes.data + offset for name, offset in stacked.items()})
    return Packed(sizes, made, TopWeights(**addresses), (piece, *tables))


def _tables(weights: Weights) -> list[str]:
    return [name for name in ("item", "categories", "event", "user_categories") if f"tokens.{name}.weight" in weights]


def _rows(weights: Weights, table: str) -> int:
    name = f"tokens.{table}.weight"
    return len(weights[name]) if name in weights else 0


def _sizes(weights: Weights, heads: int) -> Sizes:
    names = [name.split(".") for name in weights if name.startswith("blocks.")]
    first = "blocks.0.stack.0."
    width = weights[first + "norm.weight"].shape[0]
    numeric = weights["tokens.numeric.0.weight"].shape[1] if "tokens.numeric.0.weight" in weights else 0
    return Sizes(
        blocks=1 + max(int(name[1]) for name in names),
        layers=1 + max(int(name[3]) for name in names),
        width=width,
        heads=heads,
        head_room=(width // heads + 31) // 32 * 32,
        ffn=weights[first + "ffn.1.weight"].shape[0],
        gate=weights["fusion.gate.0.weight"].shape[0],
        hidden=weights["head.1.weight"].shape[0],
        tasks=weights["head.4.weight"].shape[0],
        distances=2 * weights[first + "bias.position"].shape[0] + 81,
        numeric=(numeric + 15) // 16 * 16,
        direct=int("direct.0.weight" in weights),
        item_rows=_rows(weights, "item"),
        category_rows=_rows(weights, "categories"),
        event_rows=_rows(weights, "event"),
        user_category_rows=_rows(weights, "user_categories"),
    )


def _normed(weights: Weights, norm: str, linear: str) -> tuple[Float32Array, Float32Array]:
    """A linear layer's weight and bias with the norm before it folded in."""
    weight, bias = weights[linear + ".weight"], weights[linear + ".bias"]
    return weight * weights[norm + ".weight"], bias + weight @ weights[norm + ".bias"]


def _layer(weights: Weights, name: str, heads: int) -> dict[str, Array]:
    qkv, qkv_bias = _normed(weights, name + "norm", name + "qkv")
    width = qkv.shape[1]
    scale = np.ones(3 * width, np.float32)
    scale[:width] = np.repeat(np.exp(-weights[name + "log_temperature"]) * LOG2_E, width // heads)
    up, up_bias = _normed(weights, name + "ffn.0", name + "ffn.1")
    position, time = weights[name + "bias.position"], weights[name + "bias.time"]
    return {
        "qkv": panels(qkv * scale[:, None]),
        "qkv_bias": qkv_bias * scale,
        "out": panels(weights[name + "out.weight"]),
        "out_bias": weights[name + "out.bias"],
        "up": panels(up),
        "up_bias": up_bias,
        "down": panels(weights[name + "ffn.3.weight"]),
        "down_bias": weights[name + "ffn.3.bias"],
        "positions": distance_table(position),
        "times": time.T * np.float32(LOG2_E),
        "itself": (position[0] + time[0]) * np.float32(LOG2_E),
    }


def _padded(array: Float32Array, *shape: int) -> Float32Array:
    made = np.zeros(shape, np.float32)
    made[tuple(slice(size) for size in array.shape)] = array
    return made


def _top(weights: Weights, sizes: Sizes, heads: int) -> dict[str, Array]:
    fusion, fusion_bias = _normed(weights, "fusion.norm", "fusion.qkv")
    width = sizes.width
    scale = np.ones(3 * width, np.float32)
    scale[:width] = (width // heads) ** -0.5
    head, head_bias = _normed(weights, "head.0", "head.1")
    made: dict[str, Array] = {
        "history_norm": np.stack([weights["history_norm.weight"], weights["history_norm.bias"]]),
        "candidate_norm": np.stack([weights["candidate_norm.weight"], weights["candidate_norm.bias"]]),
        "fusion_qkv": panels(fusion * scale[:, None]),
        "fusion_qkv_bias": fusion_bias * scale,
        "head_1": panels(head),
        "head_1_bias": head_bias,
        "head_2": panels(_padded(weights["head.4.weight"], 32, sizes.hidden)),
        "head_2_bias": _padded(weights["head.4.bias"], 32),
    }
    plain = {"fusion_out": "fusion.out", "gate_1": "fusion.gate.0", "gate_2": "fusion.gate.2"}
    if sizes.numeric:
        made["numeric_1"] = panels(_padded(weights["tokens.numeric.0.weight"], width, sizes.numeric))
        made["numeric_1_bias"] = weights["tokens.numeric.0.bias"]
        plain["numeric_2"] = "tokens.numeric.2"
    if sizes.direct:
        made["direct_1"] = panels(_padded(weights["direct.0.weight"], sizes.hidden, sizes.numeric))
        made["direct_1_bias"] = weights["direct.0.bias"]
        made["direct_3"] = panels(_padded(weights["direct.4.weight"], 32, sizes.hidden))
        made["direct_3_bias"] = _padded(weights["direct.4.bias"], 32)
        plain["direct_2"] = "direct.2"
    for ours, name in plain.items():
        made[ours], made[ours + "_bias"] = panels(weights[name + ".weight"]), weights[name + ".bias"]
    made |= {
        name: weights[f"tokens.{name}.weight"].T
        for name in ("values", "user_numeric")
        if f"tokens.{name}.weight" in weights
    }
    return {name: array if array.dtype == np.uint16 else array.astype(np.float32) for name, array in made.items()}
