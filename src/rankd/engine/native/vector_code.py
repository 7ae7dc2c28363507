"""LLVM code for vectors of 16 floats, written with llvmlite: what numba cannot say by itself.

In: a builder that numba hands to an intrinsic. Out: values of type FLOATS, INTS, PAIRS (32 bfloat16), BYTES. `tiles.py`
and `row_code.py` are made of these. Addresses are plain integers, counted in bytes, so no array crosses a call.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

# Without stubs both; `importlib` keeps them Any for the type checker.
ir: Any = importlib.import_module("llvmlite.ir")
types: Any = importlib.import_module("numba.core.types")
_extending: Any = importlib.import_module("numba.extending")

LANES = 16
# 2^f for |f| <= 0.5, relative error 7.5e-5: a fiftieth of a bfloat16's last bit.
EXP2 = (0.9999280735783675, 0.6932609862236716, 0.24261112187668687, 0.0551716649241565)
LOG2_E = 1.4426950408889634
# GELU is x sigmoid(1.5958 (x + 0.044715 x^3)), the tanh form (arXiv 1606.08415), within 5e-4 of the exact one.
GELU = (-1.5957691216057308 * LOG2_E, -1.5957691216057308 * LOG2_E * 0.044715)

# LLVM's bfloat, which llvmlite does not know.
BFloat: Any = type(
    "BFloat",
    (ir.Type,),
    {
        "_to_string": lambda self: "bfloat",
        "__eq__": lambda self, other: type(self) is type(other),
        "__hash__": lambda self: hash("bfloat"),
    },
)
INT, INT64, BYTE, FLOAT = ir.IntType(32), ir.IntType(64), ir.IntType(8), ir.FloatType()
FLOATS, INTS, BYTES = (ir.VectorType(kind, LANES) for kind in (FLOAT, INT, BYTE))
PAIRS = ir.VectorType(BFloat(), 2 * LANES)
HALVES = ir.VectorType(BFloat(), LANES)

Code = Any  # an llvmlite builder
Value = Any  # an llvmlite value


def emitted(signature: Any, emit: Callable[..., Value]) -> Any:
    """A numba intrinsic of a signature, whose code `emit(builder, *arguments)` writes; None stands for no result."""

    def codegen(context: Any, code: Code, _signature: Any, arguments: Any) -> Value:
        made = emit(code, *arguments)
        return context.get_dummy_value() if made is None else made

    def typing(_context: Any, *_arguments: Any) -> tuple[Any, Any]:
        return signature, codegen

    # numba reads the number of arguments off the signature of this function.
    names = ["context", *(f"a{index}" for index in range(len(signature.args)))]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    shape = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    vars(typing)["__signature__"] = shape
    typing.__name__ = emit.__name__.removeprefix("_")
    return _extending.intrinsic(typing)


def number(value: int) -> Value:
    """An address or a count."""
    return INT64(value)


def spread(value: float) -> Value:
    """The same float in all lanes, a constant."""
    return ir.Constant(FLOATS, [value] * LANES)


def vectors_of(code: Code, lanes: Value) -> Value:
    """How many vectors hold so many lanes."""
    return code.lshr(code.add(lanes, number(LANES - 1)), number(4))


def everywhere(code: Code, value: Value, kind: Any) -> Value:
    """A float or an int in all lanes."""
    undefined = ir.Constant(kind, ir.Undefined)
    first = code.insert_element(undefined, value, INT(0))
    return code.shuffle_vector(first, undefined, ir.Constant(INTS, [0] * LANES))


def load(code: Code, address: Value, kind: Any, align: int = 1) -> Value:
    """A value of a kind at an address."""
    return code.load(code.inttoptr(address, kind.as_pointer()), align=align)


def load_first(code: Code, address: Value, left: Value) -> Value:
    """INTS: the first `left` of them (an int64, 1 or more) at an address; zeros in the other lanes, which it does not
    read."""
    lanes = ir.Constant(INTS, list(range(LANES)))
    there = code.icmp_signed("<", lanes, everywhere(code, code.trunc(left, INT), INTS))
    zeros = ir.Constant(INTS, [0] * LANES)
    pointer = code.inttoptr(address, INTS.as_pointer())
    return call(code, "llvm.masked.load.v16i32.p0", INTS, pointer, INT(4), there, zeros)


def store(code: Code, value: Value, address: Value, align: int = 1) -> None:
    """Write a value at an address."""
    code.store(value, code.inttoptr(address, value.type.as_pointer()), align=align)


def repeat(
    code: Code, count: Value, held: list[Value], body: Callable[[Value, list[Value]], list[Value]]
) -> list[Value]:
    """Run `body(step, held)` for steps 0..count - 1 (at least once); what it returns is held for the next step."""
    before, loop, after = code.block, code.append_basic_block("loop"), code.append_basic_block("after")
    code.branch(loop)
    code.position_at_end(loop)
    step = code.phi(INT64)
    phis = [code.phi(value.type) for value in held]
    made = body(step, phis)
    following = code.add(step, number(1))
    for phi, first, value in zip([step, *phis], [number(0), *held], [following, *made], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(value, loop)
    code.cbranch(code.icmp_signed("<", following, count), loop, after)
    code.position_at_end(after)
    return made


def call(code: Code, name: str, result: Any, *arguments: Value) -> Value:
    """An LLVM intrinsic by name."""
    function = code.module.globals.get(name)
    if function is None:
        function = ir.Function(code.module, ir.FunctionType(result, [value.type for value in arguments]), name)
    return code.call(function, arguments)


def multiply_pairs(code: Code, total: Value, left: Value, right: Value) -> Value:
    """FLOATS: total + left[2 i] right[2 i] + left[2 i + 1] right[2 i + 1]."""
    return call(code, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, total, left, right)


def fma(code: Code, a: Value, b: Value, c: Value) -> Value:
    """FLOATS: a b + c."""
    return call(code, "llvm.fma.v16f32", FLOATS, a, b, c)


def maximum(code: Code, a: Value, b: Value) -> Value:
    """FLOATS: the larger of each two."""
    return code.select(code.fcmp_ordered(">", a, b), a, b)


def exp2(code: Code, x: Value) -> Value:
    """FLOATS: 2^x; 0 far below and infinity far above."""
    whole = call(code, "llvm.rint.v16f32", FLOATS, x)
    rest = code.fsub(x, whole)
    value = spread(EXP2[-1])
    for coefficient in EXP2[-2::-1]:
        value = fma(code, value, rest, spread(coefficient))
    mask, rounding = ir.IntType(16)(-1), INT(4)
    return call(code, "llvm.x86.avx512.mask.scalef.ps.512", FLOATS, value, whole, spread(0.0), mask, rounding)


def reciprocal(code: Code, x: Value) -> Value:
    """FLOATS: 1 / x within 2^-14."""
    return call(code, "llvm.x86.avx512.rcp14.ps.512", FLOATS, x, spread(0.0), ir.IntType(16)(-1))


def sigmoid(code: Code, x: Value) -> Value:
    """FLOATS: 1 / (1 + e^-x)."""
    return reciprocal(code, code.fadd(spread(1.0), exp2(code, code.fmul(x, spread(-LOG2_E)))))


def gelu(code: Code, x: Value) -> Value:
    """FLOATS: see GELU."""
    power = code.fmul(x, fma(code, code.fmul(x, x), spread(GELU[1]), spread(GELU[0])))
    return code.fmul(x, reciprocal(code, code.fadd(spread(1.0), exp2(code, power))))


def silu(code: Code, x: Value) -> Value:
    """FLOATS: x sigmoid(x)."""
    return code.fmul(x, sigmoid(code, x))


def relu(code: Code, x: Value) -> Value:
    """FLOATS: max(x, 0)."""
    return maximum(code, x, spread(0.0))


def identity(code: Code, x: Value) -> Value:
    """FLOATS: x."""
    return x


def store_bf16(code: Code, x: Value, address: Value) -> None:
    """Write FLOATS as 16 bfloat16, rounded to even."""
    store(code, code.fptrunc(x, HALVES), address)


def load_bf16(code: Code, address: Value) -> Value:
    """Read 16 bfloat16 as FLOATS."""
    return code.fpext(load(code, address, HALVES), FLOATS)


def total(code: Code, x: Value, name: str = "fadd") -> Value:
    """A float: the sum of the lanes, or their "fmax"."""
    for half in (8, 4, 2, 1):
        order = [(lane + half) % LANES for lane in range(LANES)]
        other = code.shuffle_vector(x, x, ir.Constant(INTS, order))
        x = code.fadd(x, other) if name == "fadd" else maximum(code, x, other)
    return code.extract_element(x, INT(0))
