"""numba's compiler under typed names, for the loops over candidates, hashes and rows: `match_kernels.py`,
`rows/decoding_kernels.py`, `cache/cache_kernels.py`.

Importing this file imports numba (.5 s): files of kernels do, and are imported themselves when they are first needed.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from rankd.types import Array

P = ParamSpec("P")
R = TypeVar("R")
# Their stubs do not cover what is used here; `importlib` keeps them Any for the type checker.
_ir: Any = importlib.import_module("llvmlite.ir")
_numba: Any = importlib.import_module("numba")
_cgutils: Any = importlib.import_module("numba.core.cgutils")
types: Any = _numba.types
from_dtype: Any = _numba.from_dtype
_FILES = (
    "machine_code.py",
    "match_kernels.py",
    "rows/decoding_kernels.py",
    "rows/row_decoding.py",
    "cache/cache_kernels.py",
    "cache/row_cache.py",
)
_SOURCE = zlib.crc32(b"".join((Path(__file__).parent / name).read_bytes() for name in _FILES))


def read(kind: Any, dimensions: int, layout: str = "A") -> Any:
    """An array that is not written to, so that it may be read-only; "A": as it lies, aligned or not."""
    return types.Array(kind, dimensions, layout, readonly=True, aligned=layout != "A")


def written(kind: Any, dimensions: int, layout: str = "C") -> Any:
    """An array that is written to, in C order unless said."""
    return types.Array(kind, dimensions, layout)


def part(function: Callable[P, R]) -> Callable[P, R]:
    """Put into the kernels that call it before they are compiled: else the arrays' owners are counted at each call,
    with 1,000 rows 22 us."""
    return cast(Callable[P, R], _numba.njit(nogil=True, error_model="numpy", inline="always")(function))


def kernel(*signatures: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Compiled now, the lock of the interpreter free while it runs; kept on disk if there is a place to write.

    What is kept goes by the content of _FILES, from which kernels have parts and constants: numba looks at the kernel's
    own file only.
    """

    def compiled(function: Callable[P, R]) -> Callable[P, R]:
        options = {"nogil": True, "error_model": "numpy"}
        function.__qualname__ = f"{function.__name__}_{_SOURCE:08x}"
        try:
            made = _numba.njit(list(signatures), cache=True, **options)(function)
        except (RuntimeError, OSError):  # no place that can be written to, or none left in it
            made = _numba.njit(list(signatures), **options)(function)
        return cast(Callable[P, R], made)

    return compiled


def _prefetch(_context: Any, array: Any, row: Any, column: Any) -> tuple[Any, Any]:
    """Ask for the cache line of array[row, column]; nothing waits for it. A hint: no address is wrong."""

    def codegen(context: Any, code: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        whole = context.make_array(kind)(context, code, arguments[0])
        place = _cgutils.get_item_pointer(context, code, kind, whole, list(arguments[1:]))
        byte, number = _ir.IntType(8).as_pointer(), _ir.IntType(32)
        hint = _ir.FunctionType(_ir.VoidType(), [byte, number, number, number])
        function = _cgutils.get_or_insert_function(code.module, hint, "llvm.prefetch.p0")
        code.call(function, [code.bitcast(place, byte), *(number(value) for value in (0, 3, 1))])  # to read, keep, data
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), codegen


prefetch: Callable[[Array, Any, Any], None] = importlib.import_module("numba.extending").intrinsic(_prefetch)
