"""Sizes of transformer layers where each has its own: what a recipe, `model.toml` and pruning say of a model.

In: the options of a model's constructor, plain or with `shape`. Out: a checked shape; next: `climber.py`, `sasrec.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

import msgspec

from rankd.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)


class HstuForm(Enum):
    """Whose layer an HSTU has: the paper's, or the one of MLPerf's dlrm-v3 (see `models.hstu.HstuLayer`)."""

    PAPER = "paper"
    DLRM_V3 = "dlrm-v3"

    @property
    def output_parts(self) -> int:
        """How many times D numbers its output projection reads."""
        return 1 if self is HstuForm.PAPER else 3


class LayerShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer: H heads of `head_width`, a feed-forward of `ffn` neurons.

    A rank above 0 says that the projection is a product of two: to so many numbers, and from there to its outputs.
    """

    heads: int
    head_width: int
    ffn: int
    qkv_rank: int = 0
    out_rank: int = 0
    up_rank: int = 0
    down_rank: int = 0

    @property
    def attention_width(self) -> int:
        """Width of the queries, of the keys and of the values."""
        return self.heads * self.head_width


class FusionShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fusion of the blocks: attention of H heads of `head_width`, a gate of `gate` neurons."""

    heads: int
    head_width: int
    gate: int


class ClimberShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A Climber's inside: the layers of each block, each used `repeats` times in succession, and the fusion."""

    blocks: tuple[tuple[LayerShape, ...], ...]
    fusion: FusionShape
    repeats: int = 1

    @property
    def state_layers(self) -> int:
        """Layers of the state: those of the deepest block."""
        return max(len(block) for block in self.blocks) * self.repeats

    @property
    def state_width(self) -> int:
        """Width of a row of the state: that of the widest layer."""
        return max(layer.attention_width for block in self.blocks for layer in block)


def even_layers(width: int, heads: int, layers: int, ffn_ratio: int) -> tuple[LayerShape, ...]:
    """Layers that are all alike and as wide as the model."""
    return (LayerShape(heads, width // heads, ffn_ratio * width),) * layers


def even_fusion(width: int, heads: int, blocks: int) -> FusionShape:
    """A fusion as wide as the model, its gate a quarter of the channels."""
    return FusionShape(heads, width // heads, blocks * width // 4)


def climber_shape(shape: Mapping[str, Any], num_blocks: int) -> ClimberShape:
    """The option `shape` of a Climber, checked.

    Raises:
        ConfigError: an unknown key, a size below 1, or layers for another number of blocks than the schema has.
    """
    made = _convert(shape, ClimberShape)
    if len(made.blocks) != num_blocks:
        raise ConfigError(f"shape.blocks has layers for {len(made.blocks)} blocks; the schema has {num_blocks}")
    if made.repeats < 1 or not all(made.blocks):
        raise ConfigError("shape: every block needs a layer, and repeats has to be at least 1")
    check_sizes((made.fusion,), "shape.fusion")
    for number, block in enumerate(made.blocks):
        check_sizes(block, f"shape.blocks[{number}]")
    return made


def layer_shapes(layers: object) -> tuple[LayerShape, ...]:
    """The option `shape` of a SASRec, a list of layers, checked.

    Raises:
        ConfigError: an unknown key, no layer, or a size below 1.
    """
    try:
        made = msgspec.convert(layers, tuple[LayerShape, ...])
    except msgspec.ValidationError as error:
        raise ConfigError(f"the option shape: {error}") from error
    if not made:
        raise ConfigError("the option shape is empty; at least one layer is needed")
    check_sizes(made, "shape")
    return made


def check_sizes(shapes: tuple[LayerShape, ...] | tuple[FusionShape], path: str) -> None:
    """Refuse sizes below 1 and ranks below 0.

    Raises:
        ConfigError: with the path of the size.
    """
    for number, shape in enumerate(shapes):
        for name, size in msgspec.structs.asdict(shape).items():
            least = 0 if name.endswith("_rank") else 1
            if size < least:
                raise ConfigError(f"{path}[{number}].{name} is {size}; it has to be at least {least}")


def _convert(document: Mapping[str, Any], kind: type[T]) -> T:
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the option shape: {error}") from error
