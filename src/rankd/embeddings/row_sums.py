"""Sums of rows in vectors, written with llvmlite: what numba cannot say by itself. `table_kernels.py` calls them.

In: addresses, as plain integers counted in bytes. Out: float32 at an address. The sums of some columns of a bag stay in
registers while its rows pass by, and rows further on are asked for meanwhile. Every column adds its numbers in the
order of the ids, so neither the width of a table nor that of the vectors changes a sum. What lines of the output to
write to is not asked for: that measured the same.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from rankd.embeddings.row_storage import SCALED
from rankd.embeddings.table_layout import LINE_BYTES
from rankd.embeddings.table_spec import TableStorage
from rankd.machine_code import types

# Without stubs; `importlib` keeps them Any for the type checker.
ir: Any = importlib.import_module("llvmlite.ir")
_extending: Any = importlib.import_module("numba.extending")

AHEAD = 32
"""Rows are asked for so many ids before they are added: random rows of a large table are what a sum waits for. 12 to 64
measure the same, 4 takes a third longer (`rankd bench tables`, fp32 and int8 of 128 numbers)."""

Code = Any  # an llvmlite builder
Value = Any  # an llvmlite value
Load = Callable[[Any, int], Value]
"""(kind, lanes): a vector of integers from where a row's columns begin."""
_BYTE, _SHORT, _INT, _LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT = ir.FloatType()
_FUSED = ("contract",)


class _Sum(NamedTuple):
    """What a sum is asked for: int64 values of the code that is being written, in the order of its arguments.

    rows: address of the first number of row 0 that is added; of row r it is rows + r * stride.
    scales: address of scale and offset of row 0, if the storage has them.
    ids: address of the bag's ids, int64; there are `count`, and `following` from here on that may be asked for.
    lines: how many cache lines of a row to ask for, 0 if another sum of the bag has done so; `last`: where the last of
        them begins at the latest, in bytes from the first number.
    out: address of the sums.
    columns: how many there are, if they are fewer than the lanes.
    """

    rows: Value
    stride: Value
    scales: Value
    ids: Value
    count: Value
    following: Value
    lines: Value
    last: Value
    out: Value
    columns: Value


def sum_of_rows(storage: TableStorage, lanes: int, masked: bool) -> Callable[..., None]:
    """A numba intrinsic of the int64 arguments of `_Sum`: `lanes` columns of a bag's rows summed, or, masked, the first
    `columns` of them, of 16 at most: then nothing past their record is read, and nothing past them is written."""

    def codegen(context: Any, code: Code, _signature: Any, arguments: Any) -> Value:
        _write_sum(code, storage, lanes, masked, _Sum(*arguments))
        return context.get_dummy_value()

    def typing(_context: Any, *_arguments: Any) -> tuple[Any, Any]:
        return types.void(*[types.int64] * len(_Sum._fields)), codegen

    # numba reads the number of arguments off the signature of this function.
    names = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("context", *_Sum._fields)]
    vars(typing)["__signature__"] = inspect.Signature(names)
    made: Callable[..., None] = _extending.intrinsic(typing)
    return made


def _write_sum(code: Code, storage: TableStorage, lanes: int, masked: bool, asked: _Sum) -> None:
    scaled = storage in SCALED
    zeros = ir.Constant(ir.VectorType(_FLOAT, lanes), [0.0] * lanes)
    columns = asked.columns if masked else None
    before = code.block
    head, body, after = (code.append_basic_block(name) for name in ("ids", "row", "summed"))
    code.branch(head)
    code.position_at_end(head)
    place, sums, offsets = code.phi(_LONG), code.phi(zeros.type), code.phi(_FLOAT)
    code.cbranch(code.icmp_signed("<", place, asked.count), body, after)

    code.position_at_end(body)
    _ask_ahead(code, asked, place)
    far = code.mul(_id_at(code, asked.ids, place), asked.stride)
    numbers = _numbers(code, storage, lanes, _loader(code, code.add(asked.rows, far), columns, lanes))
    more = offsets
    if scaled:
        both = code.load(_pointer(code, code.add(asked.scales, far), ir.VectorType(_FLOAT, 2)), align=1)
        scale, offset = (code.extract_element(both, _INT(index)) for index in (0, 1))
        numbers = code.fmul(numbers, _spread(code, scale, lanes), flags=_FUSED)
        more = code.fadd(offsets, offset)
    added = code.fadd(sums, numbers, flags=_FUSED)
    for phi, first, value in (
        (place, _LONG(0), code.add(place, _LONG(1))),
        (sums, zeros, added),
        (offsets, _FLOAT(0.0), more),
    ):
        phi.add_incoming(first, before)
        phi.add_incoming(value, code.block)
    code.branch(head)

    code.position_at_end(after)
    total = code.fadd(sums, _spread(code, offsets, lanes)) if scaled else sums
    pointer = _pointer(code, asked.out, total.type)
    if columns is None:
        code.store(total, pointer, align=4)
    else:
        there = _first_lanes(code, columns, lanes)
        _call(code, f"llvm.masked.store.v{lanes}f32.p0", ir.VoidType(), total, pointer, _INT(4), there)


def _ask_ahead(code: Code, asked: _Sum, place: Value) -> None:
    """Ask for the row AHEAD ids further on, or the last."""
    before = code.add(place, _LONG(AHEAD))
    last = code.sub(asked.following, _LONG(1))
    ahead = code.select(code.icmp_signed("<", before, last), before, last)
    address = code.add(asked.rows, code.mul(_id_at(code, asked.ids, ahead), asked.stride))
    entry, line, ready = code.block, code.append_basic_block("line"), code.append_basic_block("asked")
    code.cbranch(code.icmp_signed(">", asked.lines, _LONG(0)), line, ready)
    code.position_at_end(line)
    number = code.phi(_LONG)
    far = code.mul(number, _LONG(LINE_BYTES))
    far = code.select(code.icmp_signed("<", far, asked.last), far, asked.last)
    _prefetch(code, code.add(address, far))
    following = code.add(number, _LONG(1))
    number.add_incoming(_LONG(0), entry)
    number.add_incoming(following, line)
    code.cbranch(code.icmp_signed("<", following, asked.lines), line, ready)
    code.position_at_end(ready)


def _prefetch(code: Code, address: Value) -> None:
    """Ask for a cache line; nothing waits for it, and as a hint it may be of any address.

    Into the second cache, whose queue of misses is longer than the first one's: random rows of 1,000,000 come 1.4 to 2
    times as fast (AMD Zen 5; 128 numbers in fp32, fp16 and int8).
    """
    _call(code, "llvm.prefetch.p0", ir.VoidType(), _pointer(code, address, _BYTE), _INT(0), _INT(2), _INT(1))


def _numbers(code: Code, storage: TableStorage, lanes: int, load: Load) -> Value:
    """The numbers of a row as floats, before scale and offset."""
    floats = ir.VectorType(_FLOAT, lanes)
    if storage is TableStorage.FP32:
        return code.bitcast(load(_INT, lanes), floats)
    if storage is TableStorage.FP16:
        return code.fpext(code.bitcast(load(_SHORT, lanes), ir.VectorType(ir.HalfType(), lanes)), floats)
    if storage is TableStorage.INT8:
        return code.uitofp(load(_BYTE, lanes), floats)
    half = lanes // 2
    pairs = load(_BYTE, half)
    low = code.and_(pairs, ir.Constant(pairs.type, [15] * half))
    high = code.lshr(pairs, ir.Constant(pairs.type, [4] * half))
    order = [lane // 2 + lane % 2 * half for lane in range(lanes)]
    return code.uitofp(code.shuffle_vector(low, high, ir.Constant(ir.VectorType(_INT, lanes), order)), floats)


def _loader(code: Code, address: Value, columns: Value | None, total: int) -> Load:
    """Loads of a row's next `total` columns at an address; under a mask, of the first `columns` of them."""

    def load(kind: Any, lanes: int) -> Value:
        vector = ir.VectorType(kind, lanes)
        pointer = _pointer(code, address, vector)
        if columns is None or lanes < total:  # int4: the scale and offset that follow are as long as the whole vector
            return code.load(pointer, align=1)
        there, nothing = _first_lanes(code, columns, lanes), ir.Constant(vector, [0] * lanes)
        name = f"llvm.masked.load.v{lanes}i{kind.width}.p0"
        return _call(code, name, vector, pointer, _INT(1), there, nothing)

    return load


def _first_lanes(code: Code, count: Value, lanes: int) -> Value:
    """A mask of the first lanes, `count` (int64) of them."""
    numbers = ir.Constant(ir.VectorType(_INT, lanes), list(range(lanes)))
    return code.icmp_signed("<", numbers, _spread(code, code.trunc(count, _INT), lanes))


def _spread(code: Code, value: Value, lanes: int) -> Value:
    """The same in all lanes."""
    nothing = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = code.insert_element(nothing, value, _INT(0))
    return code.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(_INT, lanes), [0] * lanes))


def _id_at(code: Code, ids: Value, place: Value) -> Value:
    return code.load(_pointer(code, code.add(ids, code.mul(place, _LONG(8))), _LONG))


def _pointer(code: Code, address: Value, kind: Any) -> Value:
    return code.inttoptr(address, kind.as_pointer())


def _call(code: Code, name: str, result: Any, *arguments: Value) -> Value:
    function = code.module.globals.get(name)
    if function is None:
        function = ir.Function(code.module, ir.FunctionType(result, [value.type for value in arguments]), name)
    return code.call(function, arguments)


def _ask_to_read(_context: Any, _address: Any) -> tuple[Any, Any]:
    """Ask for the cache line of an address, int64."""

    def codegen(context: Any, code: Code, _signature: Any, arguments: Any) -> Value:
        _prefetch(code, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


ask_to_read: Callable[[int], None] = _extending.intrinsic(_ask_to_read)
