"""Matrix products over tiles: `tiles.py` covers a matrix, a panel of 32 columns at a time.

In: addresses. Out: written where `out` says. A panel (K x 32 x 2 bytes, 16 KB with K = 256) stays in the first-level
cache while all rows pass by; the weights are read from the third level once a call. Next: `layer_steps.py`.
"""

from __future__ import annotations

from typing import Any

from rankd.engine.native import tiles
from rankd.engine.native.compiled import SOURCE, outside

tall, short, single = tiles.LINEAR  # `outside` puts others into each copy


def _product(name: str, heights: tuple[Any, Any, Any], out_bytes: int, source: int) -> Any:
    step = 32 * out_bytes

    def product(
        rows: int, stride: int, count: int, weights: int, pairs: int, panels: int, out: int, out_stride: int, bias: int
    ) -> None:
        if source == -len(name):  # never: they are read for the cache's sake, see `outside`
            return
        for n in range(panels):
            panel, there, bias_here = weights + n * pairs * 128, out + n * step, bias + n * 128
            row = 0
            while row + 12 <= count:
                tall(rows + row * stride, stride, panel, pairs, there + row * out_stride, out_stride, bias_here)
                row += 12
            while row + 4 <= count:
                short(rows + row * stride, stride, panel, pairs, there + row * out_stride, out_stride, bias_here)
                row += 4
            while row < count:
                single(rows + row * stride, stride, panel, pairs, there + row * out_stride, out_stride, bias_here)
                row += 1

    product.__name__ = name
    return outside(product, 9, tall=heights[0], short=heights[1], single=heights[2])


# (rows, stride, count, weights, pairs, panels, out, out_stride, bias); strides in bytes, pairs = K / 2.
linear = _product("linear", tiles.LINEAR, 2, SOURCE)
gelu = _product("gelu", tiles.GELU, 2, SOURCE)
silu = _product("silu", tiles.SILU, 2, SOURCE)
relu = _product("relu", tiles.RELU, 2, SOURCE)
add = _product("add", tiles.ADD, 4, SOURCE)
gate = _product("gate", tiles.GATE, 4, SOURCE)
