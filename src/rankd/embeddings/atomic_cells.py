"""Int64 cells that several threads read and write, and giving way to other threads: for compiled loops that run without
the interpreter's lock. In: addresses.

Who takes what another thread has put sees all that it wrote before (acquire and release).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from rankd.machine_code import types

# Without stubs; `importlib` keeps them Any for the type checker.
_ir: Any = importlib.import_module("llvmlite.ir")
_intrinsic: Any = importlib.import_module("numba.extending").intrinsic
_LONG, _INT = _ir.IntType(64), _ir.IntType(32)
_ALIGNED = 8


def _cell(code: Any, address: Any) -> Any:
    return code.inttoptr(address, _LONG.as_pointer())


def _take(_context: Any, _address: Any) -> tuple[Any, Any]:
    """What is in a cell."""

    def codegen(_context: Any, code: Any, _signature: Any, arguments: Any) -> Any:
        return code.load_atomic(_cell(code, arguments[0]), "acquire", _ALIGNED)

    return types.int64(types.int64), codegen


def _put(_context: Any, _address: Any, _number: Any) -> tuple[Any, Any]:
    """Write a cell."""

    def codegen(context: Any, code: Any, _signature: Any, arguments: Any) -> Any:
        code.store_atomic(arguments[1], _cell(code, arguments[0]), "release", _ALIGNED)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _add(_context: Any, _address: Any, _number: Any) -> tuple[Any, Any]:
    """Add to a cell; what was in it before."""

    def codegen(_context: Any, code: Any, _signature: Any, arguments: Any) -> Any:
        return code.atomic_rmw("add", _cell(code, arguments[0]), arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


def _swap(_context: Any, _address: Any, _expected: Any, _number: Any) -> tuple[Any, Any]:
    """Write a cell if it has what is expected; whether it had."""

    def codegen(_context: Any, code: Any, _signature: Any, arguments: Any) -> Any:
        address, expected, number = arguments
        both = code.cmpxchg(_cell(code, address), expected, number, "acq_rel", "acquire")
        return code.extract_value(both, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


def _give_way(_context: Any) -> tuple[Any, Any]:
    """Let another thread have the core, if one wants it (POSIX); .7 us if none does."""

    def codegen(context: Any, code: Any, _signature: Any, _arguments: Any) -> Any:
        name = "sched_yield"
        function = code.module.globals.get(name) or _ir.Function(code.module, _ir.FunctionType(_INT, []), name)
        code.call(function, [])
        return context.get_dummy_value()

    return types.void(), codegen


take: Callable[[int], int] = _intrinsic(_take)
put: Callable[[int, int], None] = _intrinsic(_put)
add: Callable[[int, int], int] = _intrinsic(_add)
swap: Callable[[int, int, int], bool] = _intrinsic(_swap)
give_way: Callable[[], None] = _intrinsic(_give_way)
