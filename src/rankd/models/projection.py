"""A linear layer that may be a product of two smaller ones, and of which single outputs can be asked for."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import linear


class Projection(nn.Linear):
    """inputs -> outputs. With a rank r above 0: inputs -> r without bias (`reduce`), then r -> outputs.

    `weight` (outputs, inputs), or (outputs, r) with a rank; `bias` (outputs,). Without a rank it is an nn.Linear.
    """

    def __init__(self, inputs: int, outputs: int, rank: int = 0) -> None:
        super().__init__(rank or inputs, outputs)
        self.reduce = nn.Linear(inputs, rank, bias=False) if rank else None

    def reduced(self, x: Tensor) -> Tensor:
        """What `rows` reads: x (..., inputs) itself, or its r numbers."""
        if self.reduce is None:
            return x
        made: Tensor = self.reduce(x)
        return made

    def rows(self, reduced: Tensor, rows: slice, scale: Tensor | None = None) -> Tensor:
        """Some of the outputs, each times its `scale` (outputs,); the scale goes into the weights."""
        weight, bias = self.weight[rows], self.bias[rows]
        if scale is None:
            return linear(reduced, weight, bias)
        return linear(reduced, weight * scale[:, None], bias * scale)

    def forward(self, x: Tensor) -> Tensor:
        """All outputs (..., outputs)."""
        return linear(self.reduced(x), self.weight, self.bias)
