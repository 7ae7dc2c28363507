"""A ranker's weights on the GPU: the layers of all blocks stacked, norms and factors of the softmax folded in.

In: the state_dict of a ranker that is made of blocks, as arrays. Out: `RankerWeights`: what such rankers have in
common, and the layers of one kind, `climber_layers.py` or `hstu_layers.py`. Next: `ranker_steps.py` launches them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rankd.engine.cuda.cuda_device import Device
from rankd.engine.cuda.kernels.triton_attention_steps import AttentionTables
from rankd.engine.cuda.kernels.triton_pooled_gather import Pooling
from rankd.engine.cuda.kernels.triton_projection import EPSILON, Linear, folded
from rankd.features.schema import FeatureSchema
from rankd.types import Array

Put = Callable[[Tensor], Tensor]
"""A tensor of the host, copied to the GPU."""


class LayerRooms(Protocol):
    """Memory that R rows of N blocks pass the layers through, and the launches around attention.

    tokens (N, R, D) float32; qkv (N, R, 3 A) queries, keys and values of a layer; attended (N, R, A) what attention
    leaves there. The last two may be parts of something wider.
    """

    tokens: Tensor
    qkv: Tensor
    attended: Tensor

    def project(self, depth: int, counts: Tensor) -> None:
        """Make `qkv` of the tokens."""
        ...

    def finish(self, depth: int, counts: Tensor) -> None:
        """Make the next tokens of what was attended."""
        ...


Joining = Callable[[Tensor], Tensor]
"""Takes how many rows there are, (N,) int32 on the GPU; gives what the head reads, (1, R, N D)."""


class Layers(Protocol):
    """The layers of all blocks of one kind of ranker, and how the blocks' outputs are joined."""

    @property
    def depth(self) -> int:
        """L: layers of a block."""
        ...

    def rooms(self, device: Device, rows: int, dtype: torch.dtype) -> LayerRooms:
        """Memory for R rows."""
        ...

    def joining(self, device: Device, rows: int, dtype: torch.dtype, tokens: Tensor) -> Joining:
        """What makes one row a candidate of tokens (N, R, D)."""
        ...


@dataclass(frozen=True, slots=True)
class RankerWeights:
    """Everything: N blocks of tokens D wide, whose attention is A wide; `hidden` is the head's.

    `users` is None without user features in the schema, `numeric` and `direct` without numbers.
    """

    blocks: int
    width: int
    attention_width: int
    hidden: int
    layers: Layers
    tables: AttentionTables
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


class WeightReader:
    """Reads a state_dict; `dtype` is that of the arithmetic, biases and tables of attention are float32. A name that is
    not there is a KeyError: the state_dict is another model's."""

    def __init__(self, weights: Mapping[str, Array], dtype: torch.dtype, put: Put) -> None:
        self._weights, self._dtype, self.put = weights, dtype, put
        names = [name.split(".") for name in weights if name.startswith("blocks.")]
        self.blocks = 1 + max(int(name[1]) for name in names)
        self.depth = 1 + max(int(name[3]) for name in names)
        self.width = self.floats("history_norm.weight").shape[0]

    def ranker(
        self, schema: FeatureSchema, attention_width: int, layers: Layers, tables: AttentionTables
    ) -> RankerWeights:
        """All of it, around the layers of one kind."""
        return RankerWeights(
            self.blocks, self.width, attention_width, self.floats("head.1.weight").shape[0], layers, tables,
            (self.normed("head.0", "head.1", "silu"), self.linear("head.4")),
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

    def both(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight and bias of a layer, on the host."""
        return self.floats(f"{name}.weight"), self.floats(f"{name}.bias")

    def names(self, depth: int) -> list[str]:
        """How the names of the layers of that depth begin, one for each block."""
        return [f"blocks.{block}.stack.{depth}." for block in range(self.blocks)]

    def linear(self, name: str, activation: str = "") -> Linear:
        """A layer by itself."""
        return self.stacked([self.both(name)], False, activation)

    def normed(self, norm: str, name: str, activation: str = "") -> Linear:
        """A layer with the norm before it."""
        return self.stacked([self.with_norm(norm, name)], True, activation)

    def with_norm(self, norm: str, name: str) -> tuple[Tensor, Tensor]:
        """Weight and bias of a layer with those of the norm before it folded in."""
        return folded(*self.both(name), *self.both(norm))

    def stacked(
        self,
        parts: Sequence[tuple[Tensor, Tensor]],
        normed: bool,
        activation: str = "",
        activated_from: int = 0,
        epsilon: float = EPSILON,
    ) -> Linear:
        """Layers of several blocks as one launch has them."""
        weight, bias = torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])
        return Linear(self.put(weight.to(self._dtype)), self.put(bias), normed, activation, activated_from, epsilon)

    def of_layers(self, name: str) -> Tensor:
        """One tensor of every layer, (N, L, ...)."""
        every = [[self.floats(start + name) for start in self.names(depth)] for depth in range(self.depth)]
        return torch.stack([torch.stack(blocks) for blocks in every], 1)

    def biases(self, factor: float) -> tuple[Tensor, Tensor]:
        """Relative biases of positions (N, L, H, X) and times (N, L, H, 48), times a factor."""
        position, time = (self.of_layers(f"bias.{name}").transpose(-1, -2) * factor for name in ("position", "time"))
        return self.put(position.contiguous()), self.put(time.contiguous())

    def _pooling(self, columns: Sequence[tuple[str, int]], numbers: str, norm: str) -> Pooling:
        """Tables one after the other; `columns` says how many columns read each of them."""
        tables = [self.floats(f"tokens.{name}.weight") for name, count in columns if count]
        sizes = [len(table) for table in tables]
        repeats = torch.tensor([count for _, count in columns if count], dtype=torch.int64)
        starts = torch.tensor([sum(sizes[:number]) for number in range(len(sizes))], dtype=torch.int32)
        whole = torch.cat(tables) if tables else torch.zeros(1, self.width)
        weight = self.floats(f"tokens.{numbers}.weight").t().contiguous() if self.has(f"tokens.{numbers}") else None
        both = torch.stack([self.floats(f"{norm}.weight"), self.floats(f"{norm}.bias")]) if norm else None
        return Pooling(
            self.put(whole.to(self._dtype)),
            self.put(starts.repeat_interleave(repeats)),
            self.put(torch.tensor(sizes, dtype=torch.int32).repeat_interleave(repeats)),
            None if weight is None else self.put(weight),
            None if both is None else self.put(both),
        )
