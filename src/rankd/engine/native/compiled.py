"""numba's compiler under a typed name, and the number that tells one version of this folder from another."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, ParamSpec, TypeVar, cast

from rankd.engine.native.vector_code import Code, Value, call, emitted, ir, types

P = ParamSpec("P")
R = TypeVar("R")
_numba: Any = importlib.import_module("numba")
_binding: Any = importlib.import_module("llvmlite.binding")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile at the first call; the interpreter's lock is free while it runs."""
    return cast(Callable[P, R], _numba.njit(nogil=True)(function))


def kept(function: Callable[P, R]) -> Callable[P, R]:
    """As `compiled`; the machine code is kept on disk for the next process.

    numba looks at the function's own file only, so the function must read SOURCE from its closure: then code that was
    made from other sources of this folder is not used.
    """
    return cast(Callable[P, R], _numba.njit(nogil=True, cache=True)(function))


SOURCE = zlib.crc32(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))))


def outside(function: Callable[..., None], num_integers: int, **names: Any) -> Any:
    """Compile a function of integers by itself; what calls it finds it by its symbol and does not contain it.

    numba links the functions that a function calls into it, and optimises the whole again, at every level: with the
    tiles in their callers the first start took 22 s instead of 14. `names` take the place of globals in the function's
    code. As with `kept`, the function must read SOURCE, and something that is its own, from its closure.
    """
    signature = types.void(*[types.intp] * num_integers)
    own = FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, None, function.__closure__
    )
    own.__qualname__ = function.__name__
    symbol = f"rankd_native_{SOURCE:x}_{function.__name__}"
    _binding.add_symbol(symbol, _numba.cfunc(signature, cache=True)(own).address)

    def emit(code: Code, *arguments: Value) -> None:
        call(code, symbol, ir.VoidType(), *arguments)

    return emitted(signature, emit)
