"""Vector code that stands by itself: compiled once, called by its symbol (`compiled.outside` says why).

In: an intrinsic of integers and its name. Out: one that calls it. Next: `layer_steps.py`, `history_attention.py`,
`candidate_attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rankd.engine.native import row_code, tiles
from rankd.engine.native.compiled import SOURCE, outside
from rankd.engine.native.layer_code import pack_2_values as _pack_2_values
from rankd.engine.native.layer_code import pack_16_keys as _pack_16_keys

code: Any = None  # the intrinsic; `outside` puts one into each copy


# One function for each number of arguments: numba wants them written out, in a file. The comparison is never true;
# `outside` wants both names in the closure.
def _of_4(name: str, source: int) -> Callable[..., None]:
    def call(a: int, b: int, c: int, d: int) -> None:
        if source != -len(name):
            code(a, b, c, d)

    return call


def _of_5(name: str, source: int) -> Callable[..., None]:
    def call(a: int, b: int, c: int, d: int, e: int) -> None:
        if source != -len(name):
            code(a, b, c, d, e)

    return call


def _of_7(name: str, source: int) -> Callable[..., None]:
    def call(a: int, b: int, c: int, d: int, e: int, f: int, g: int) -> None:
        if source != -len(name):
            code(a, b, c, d, e, f, g)

    return call


def _of_8(name: str, source: int) -> Callable[..., None]:
    def call(a: int, b: int, c: int, d: int, e: int, f: int, g: int, h: int) -> None:
        if source != -len(name):
            code(a, b, c, d, e, f, g, h)

    return call


def _of_9(name: str, source: int) -> Callable[..., None]:
    def call(a: int, b: int, c: int, d: int, e: int, f: int, g: int, h: int, i: int) -> None:
        if source != -len(name):
            code(a, b, c, d, e, f, g, h, i)

    return call


_OF = {4: _of_4, 5: _of_5, 7: _of_7, 8: _of_8, 9: _of_9}


def _alone(name: str, intrinsic: Any, num_integers: int) -> Any:
    function = _OF[num_integers](name, SOURCE)
    function.__name__ = name
    return outside(function, num_integers, code=intrinsic)


RAW = tuple(_alone(f"raw_{height}", tile, 7) for height, tile in zip(tiles.HEIGHTS, tiles.RAW, strict=True))
SCALE = tuple(_alone(f"scale_{height}", tile, 7) for height, tile in zip(tiles.HEIGHTS, tiles.SCALE, strict=True))
OWN = tuple(_alone(f"own_{height}", tile, 9) for height, tile in zip(tiles.HEIGHTS, tiles.OWN, strict=True))
history_softmax = _alone("history_softmax", row_code.history_softmax, 8)
candidate_softmax = _alone("candidate_softmax", row_code.candidate_softmax, 9)
pack_16_keys = _alone("pack_16_keys", _pack_16_keys, 4)
pack_2_values = _alone("pack_2_values", _pack_2_values, 5)
