"""numba's compiler under typed names, for the loops over candidates, hashes, rows and tables: the files `*_kernels.py`.

Importing this file imports numba (.5 s): files of kernels do, and are imported themselves when they are first needed.
"""

from __future__ import annotations

import ast
import importlib
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any, ParamSpec, TypeVar, cast

from rankd.types import Array, Float32Array, Int64Array

P = ParamSpec("P")
R = TypeVar("R")
# Their stubs do not cover what is used here; `importlib` keeps them Any for the type checker.
_ir: Any = importlib.import_module("llvmlite.ir")
_numba: Any = importlib.import_module("numba")
_cgutils: Any = importlib.import_module("numba.core.cgutils")
types: Any = _numba.types
from_dtype: Any = _numba.from_dtype
_ROOT = Path(__file__).parent


def sources(file: Path) -> set[Path]:
    """A file of ours, those of ours that it imports, those that they import, and so on: all that machine code made of
    it can contain."""
    found, new = set(), {file}
    while new:
        found |= new
        new = {one for name in new for one in _imported(name)} - found
    return found


@cache
def _imported(file: Path) -> tuple[Path, ...]:
    names = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    package = _ROOT.name
    places = [_ROOT.parent.joinpath(*name.split(".")) for name in names if name.split(".")[0] == package]
    files = [one for place in places for one in (place.with_suffix(".py"), place / "__init__.py")]
    return tuple(one for one in files if one.is_file())


@cache
def source_number(file: Path) -> int:
    """Tells the contents of `sources(file)` from others."""
    return zlib.crc32(b"".join(one.read_bytes() for one in sorted(sources(file))))


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

    What is kept goes by the content of all `sources` of the kernel's file, from which it may have parts and constants:
    numba looks at the file alone.
    """

    def compiled(function: Callable[P, R]) -> Callable[P, R]:
        options = {"nogil": True, "error_model": "numpy"}
        number = source_number(Path(cast(FunctionType, function).__code__.co_filename))
        function.__qualname__ = f"{function.__name__}_{number:08x}"
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


def _pointer_to(kind: Any, value: Any) -> Any:
    """An intrinsic: an address, int64, as a pointer to numbers of a kind."""

    def as_pointer(_context: Any, _address: Any) -> tuple[Any, Any]:
        def codegen(_context: Any, code: Any, _signature: Any, arguments: Any) -> Any:
            return code.inttoptr(arguments[0], value.as_pointer())

        return types.CPointer(kind)(types.int64), codegen

    return importlib.import_module("numba.extending").intrinsic(as_pointer)


def _store(_context: Any, _address: Any, number: Any) -> tuple[Any, Any]:
    """Write a number to an address, int64, as it lies, aligned or not."""

    def codegen(context: Any, code: Any, _signature: Any, arguments: Any) -> Any:
        address, value = arguments
        code.store(value, code.inttoptr(address, value.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, number), codegen


store: Callable[[int, Any], None] = importlib.import_module("numba.extending").intrinsic(_store)
_float_pointer: Any = _pointer_to(types.float32, _ir.FloatType())
_int_pointer: Any = _pointer_to(types.int64, _ir.IntType(64))
_short_pointer: Any = _pointer_to(types.uint16, _ir.IntType(16))
_carray: Any = _numba.carray


@part
def floats_at(address: int, count: int) -> Float32Array:
    """The `count` numbers, float32, at an address: of arrays that differ in number from call to call. Whoever gives the
    address keeps the memory."""
    found: Float32Array = _carray(_float_pointer(address), (count,))
    return found


@part
def ints_at(address: int, count: int) -> Int64Array:
    """The same of int64."""
    found: Int64Array = _carray(_int_pointer(address), (count,))
    return found


@part
def shorts_at(address: int, count: int) -> Array:
    """The same of uint16."""
    found: Array = _carray(_short_pointer(address), (count,))
    return found
