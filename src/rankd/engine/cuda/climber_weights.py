"""A Climber's weights on the GPU: the layers of all blocks stacked, norms and factors of the softmax folded in.

In: the state_dict of models.climber.Climber as arrays. Out: `ClimberWeights`. Next: `climber_steps.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rankd.engine.cuda.kernels.triton_attention_steps import AttentionTables
from rankd.engine.cuda.kernels.triton_feed_forward import WIDEST, FeedForward
from rankd.engine.cuda.kernels.triton_pieces import LOG2_E
from rankd.engine.cuda.kernels.triton_pooled_gather import Pooling
from rankd.engine.cuda.kernels.triton_projection import Linear, folded
from rankd.features.schema import FeatureSchema
from rankd.types import Array

Put = Callable[[Tensor], Tensor]
"""A tensor of the host, copied to the GPU."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer of all blocks; the feed-forward in one piece, or in two where it is wider than a kernel takes."""

    qkv: Linear
    out: Linear
    feed_forward: FeedForward | tuple[Linear, Linear]


@dataclass(frozen=True, slots=True)
class FusionWeights:
    """The fusion of the blocks. `scale` is that of a logit, in powers of two."""

    qkv: Linear
    out: Linear
    gate: tuple[Linear, Linear]
    heads: int
    scale: float


@dataclass(frozen=True, slots=True)
class ClimberWeights:
    """Everything. `users` is None without user features in the schema, `numeric` and `direct` without numbers."""

    blocks: int
    width: int
    attention_width: int
    hidden: int
    layers: tuple[LayerWeights, ...]
    tables: AttentionTables
    fusion: FusionWeights
    head: tuple[Linear, Linear]
    events: Pooling
    candidates: Pooling
    users: Pooling | None
    numeric: tuple[Linear, Linear] | None
    direct: tuple[Linear, Linear, Linear] | None

    @property
    def num_tasks(self) -> int:
        """K."""
        return self.head[1].weight.shape[1]

    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in tensors_in(self))


def tensors_in(weights: object) -> list[Tensor]:
    """Every tensor of nested dataclasses and tuples."""
    if isinstance(weights, Tensor):
        return [weights]
    if isinstance(weights, tuple):
        return [tensor for part in weights for tensor in tensors_in(part)]
    names = getattr(weights, "__dataclass_fields__", ())
    return [tensor for name in names for tensor in tensors_in(getattr(weights, name))]


class WeightLoader:
    """Reads a state_dict; `dtype` is that of the arithmetic, biases and tables of attention are float32."""

    def __init__(self, weights: Mapping[str, Array], dtype: torch.dtype, put: Put) -> None:
        self._weights, self._dtype, self._put = weights, dtype, put
        names = [name.split(".") for name in weights if name.startswith("blocks.")]
        self.blocks = 1 + max(int(name[1]) for name in names)
        self.depth = 1 + max(int(name[3]) for name in names)

    def load(self, schema: FeatureSchema, fusion_heads: int) -> ClimberWeights:
        """All of it. Raises KeyError for a state_dict of another model."""
        layers = tuple(self._layer(depth) for depth in range(self.depth))
        width, wide = self.floats("history_norm.weight").shape[0], layers[0].out.weight.shape[2]
        return ClimberWeights(
            self.blocks, width, wide, self.floats("head.1.weight").shape[0], layers, self._tables(),
            self._fusion(fusion_heads), (self.normed("head.0", "head.1", "silu"), self.linear("head.4")),
            self._pooling((("item", 1), ("event", 1), ("categories", schema.item_columns)), "values", "history_norm"),
            self._pooling((("item", 1), ("categories", schema.item_columns)), "", "candidate_norm"),
            self._pooling((("user_categories", schema.user_columns),), "user_numeric", "")
            if schema.user_columns or schema.user_numeric else None,
            (self.linear("tokens.numeric.0", "silu"), self.linear("tokens.numeric.2"))
            if self.has("tokens.numeric.0") else None,
            (self.linear("direct.0", "silu"), self.linear("direct.2", "silu"), self.linear("direct.4"))
            if self.has("direct.0") else None,
        )  # fmt: skip

    def has(self, name: str) -> bool:
        """Whether there is such a layer."""
        return f"{name}.weight" in self._weights

    def floats(self, name: str) -> Tensor:
        """One tensor in float32, on the host."""
        return torch.from_numpy(np.ascontiguousarray(self._weights[name], np.float32))

    def linear(self, name: str, activation: str = "") -> Linear:
        """A layer by itself."""
        return self._stacked([(self.floats(f"{name}.weight"), self.floats(f"{name}.bias"))], False, activation)

    def normed(self, norm: str, name: str, activation: str = "") -> Linear:
        """A layer with the norm before it."""
        return self._stacked([self._folded(norm, name)], True, activation)

    def _folded(self, norm: str, name: str) -> tuple[Tensor, Tensor]:
        weights = self.floats(f"{name}.weight"), self.floats(f"{name}.bias")
        return folded(*weights, self.floats(f"{norm}.weight"), self.floats(f"{norm}.bias"))

    def _stacked(self, parts: Sequence[tuple[Tensor, Tensor]], normed: bool, activation: str = "") -> Linear:
        weight, bias = torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])
        return Linear(self._put(weight.to(self._dtype)), self._put(bias), normed, activation)

    def _layer(self, depth: int) -> LayerWeights:
        names = [f"blocks.{block}.stack.{depth}." for block in range(self.blocks)]
        plain = {
            part: [(self.floats(f"{name}{part}.weight"), self.floats(f"{name}{part}.bias")) for name in names]
            for part in ("out", "ffn.3")
        }
        down = self._stacked(plain["ffn.3"], False)
        up = self._stacked([self._folded(f"{name}ffn.0", f"{name}ffn.1") for name in names], True, "gelu")
        whole = FeedForward(up.weight, up.bias, down.weight, down.bias)
        return LayerWeights(
            self._stacked([self._folded(f"{name}norm", f"{name}qkv") for name in names], True),
            self._stacked(plain["out"], False),
            whole if down.weight.shape[1] <= WIDEST else (up, down),
        )

    def _tables(self) -> AttentionTables:
        def of_layers(name: str) -> Tensor:
            return torch.stack(
                [
                    torch.stack([self.floats(f"blocks.{block}.stack.{depth}.{name}") for depth in range(self.depth)])
                    for block in range(self.blocks)
                ]
            )

        position, time = (of_layers(f"bias.{name}").transpose(-1, -2) * LOG2_E for name in ("position", "time"))
        temperature = of_layers("log_temperature").neg().exp() * LOG2_E
        return AttentionTables(self._put(temperature), self._put(position.contiguous()), self._put(time.contiguous()))

    def _fusion(self, heads: int) -> FusionWeights:
        out = self.linear("fusion.out")
        scale = LOG2_E * (out.weight.shape[2] // heads) ** -0.5
        gate = self.linear("fusion.gate.0", "relu"), self.linear("fusion.gate.2")
        return FusionWeights(self.normed("fusion.norm", "fusion.qkv"), out, gate, heads, scale)

    def _pooling(self, columns: Sequence[tuple[str, int]], numbers: str, norm: str) -> Pooling:
        """Tables one after the other; `columns` says how many columns read each of them."""
        width = self.floats("history_norm.weight").shape[0]
        tables = [self.floats(f"tokens.{name}.weight") for name, count in columns if count]
        sizes = [len(table) for table in tables]
        repeats = torch.tensor([count for _, count in columns if count], dtype=torch.int64)
        starts = torch.tensor([sum(sizes[:number]) for number in range(len(sizes))], dtype=torch.int32)
        whole = torch.cat(tables) if tables else torch.zeros(1, width)
        weight = self.floats(f"tokens.{numbers}.weight").t().contiguous() if self.has(f"tokens.{numbers}") else None
        both = torch.stack([self.floats(f"{norm}.weight"), self.floats(f"{norm}.bias")]) if norm else None
        return Pooling(
            self._put(whole.to(self._dtype)),
            self._put(starts.repeat_interleave(repeats)),
            self._put(torch.tensor(sizes, dtype=torch.int32).repeat_interleave(repeats)),
            None if weight is None else self._put(weight),
            None if both is None else self._put(both),
        )
