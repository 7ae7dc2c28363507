"""Where the structures of a model lie: which axis of which tensor belongs to heads, neurons and channels.

In: a Climber or a SASRec. Out: `Anatomy`; `importance.py` sums over these axes, `surgery.py` cuts along them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

from torch import nn

from rankd.compress.compression_recipe import Matrix
from rankd.errors import BuildError
from rankd.models.climber import Climber
from rankd.models.layer_shapes import FusionShape, LayerShape
from rankd.models.sasrec import SASRec

MATRIX_NAMES = {Matrix.QKV: "qkv", Matrix.OUT: "out", Matrix.UP: "ffn.1", Matrix.DOWN: "ffn.3"}


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Sizes of a model: width D, the layers of each block, and of a Climber its fusion and how often layers repeat.

    `fusion` is None for a SASRec, which has one block; `hidden` are the neurons of the Climber's head, K its tasks.
    """

    width: int
    blocks: tuple[tuple[LayerShape, ...], ...]
    num_tasks: int
    fusion: FusionShape | None = None
    hidden: int = 0
    repeats: int = 1

    def layer_name(self, block: int, layer: int) -> str:
        """What the names of a layer's tensors begin with."""
        return f"layers.{layer}." if self.fusion is None else f"blocks.{block}.stack.{layer}."

    def layers(self) -> Iterator[tuple[str, LayerShape]]:
        """Every layer: the beginning of its names, and its sizes."""
        for block, stack in enumerate(self.blocks):
            for layer, shape in enumerate(stack):
                yield self.layer_name(block, layer), shape

    def with_layers(self, blocks: tuple[tuple[LayerShape, ...], ...], repeats: int = 1) -> Anatomy:
        """The same with other layers, each used `repeats` times as often as now."""
        return replace(self, blocks=blocks, repeats=self.repeats * repeats)

    def has_prunable_width(self) -> bool:
        """Whether channels of the embedding can be left out: a SASRec's logits depend on its width by themselves."""
        return self.fusion is not None


def anatomy_of(model: nn.Module) -> Anatomy:
    """The sizes of a model.

    Raises:
        BuildError: a model whose structures are not known.
    """
    if isinstance(model, Climber):
        hidden, tasks = (cast(nn.Linear, model.head[place]).out_features for place in (1, 4))
        width = model.history_norm.normalized_shape[0]
        return Anatomy(width, model.shape.blocks, tasks, model.shape.fusion, hidden, model.shape.repeats)
    if isinstance(model, SASRec):
        return Anatomy(model.norm.normalized_shape[0], (model.shape,), model.own.out_features)
    raise BuildError(
        f"a {type(model).__name__} cannot be compressed: its structures are not known; climber and sasrec can"
    )


def input_name(projection: str, rank: int) -> str:
    """The tensor whose second axis are a projection's inputs."""
    return f"{projection}.reduce.weight" if rank else f"{projection}.weight"
