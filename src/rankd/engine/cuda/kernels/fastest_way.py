"""Which of several ways to compute the same is the fastest on this GPU, for each shape; measured at its first call.

A kernel of ours that has everything in it, or the library's matrix product with what stands around it in kernels of
its own: for small launches the first wins, for large ones it depends on the GPU. As with the kernels' own block sizes
(`triton_pieces.tuned`) the first way is taken unmeasured in the interpreter and with RANKD_CUDA_TUNE=off.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence

from torch import Tensor

from rankd.engine.cuda.kernels.triton_pieces import measured, measures

log = logging.getLogger("rankd")
Way = Callable[[], None]


class FastestWay:
    """The choice of one kind of work, by shape. `milliseconds` measures one way; it may run it any number of times."""

    def __init__(self, name: str, milliseconds: Callable[[Way], float] | None = None) -> None:
        self._name, self._milliseconds = name, milliseconds or measured
        self._measures = milliseconds is not None or measures()
        self._chosen: dict[Hashable, str] = {}

    def run(self, shape: Hashable, ways: Mapping[str, Way], changed: Sequence[Tensor] = ()) -> None:
        """Compute in the fastest way. `changed` are read and written: they are put back after measuring."""
        if len(ways) == 1 or not self._measures:
            next(iter(ways.values()))()
            return
        if shape not in self._chosen:
            before = [tensor.clone() for tensor in changed]
            took = {name: self._milliseconds(way) for name, way in ways.items()}
            for tensor, old in zip(changed, before, strict=True):
                tensor.copy_(old)
            self._chosen[shape] = min(took, key=took.__getitem__)
            log.debug("%s of %s: %s", self._name, shape, ", ".join(f"{n} {ms:.3f} ms" for n, ms in took.items()))
        ways[self._chosen[shape]]()
