"""What is done to one row at a time, all in vectors: norms, sums of embeddings, time buckets and softmax.

In and out: addresses of rows in bytes; widths are multiples of 16. `history_attention.py`, `candidate_attention.py` and
`embedding.py` call these.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from rankd.engine.native.vector_code import (
    BYTES,
    FLOAT,
    FLOATS,
    INT,
    INT64,
    INTS,
    LANES,
    PAIRS,
    Code,
    Value,
    call,
    emitted,
    everywhere,
    exp2,
    ir,
    load,
    load_bf16,
    load_first,
    maximum,
    multiply_pairs,
    number,
    repeat,
    spread,
    store,
    store_bf16,
    total,
    types,
    vectors_of,
)

TIME_BUCKETS = 48  # models.blocks.TIME_BUCKETS: three vectors of 16
FAR_BELOW = -1e30  # 2^ of it is 0, and less anything else it stays finite
EPSILON = 1e-5  # torch's LayerNorm
MIDDLE = struct.unpack("I", struct.pack("f", math.sqrt(2.0)))[0] & 0x7FFFFF  # mantissa bits of sqrt(2)


def _at(code: Code, address: Value, step: Value, size: int) -> Value:
    return code.add(address, code.mul(step, number(size)))


def _scalar(code: Code, value: Value) -> Value:
    return everywhere(code, value, FLOATS)


def _moments(code: Code, row: Value, vectors: Value) -> tuple[Value, Value]:
    """Mean and 1 / standard deviation of a row, in all lanes."""
    count = code.fmul(code.sitofp(vectors, FLOAT), FLOAT(float(LANES)))

    def add(step: Value, held: list[Value]) -> list[Value]:
        return [code.fadd(held[0], load(code, _at(code, row, step, 64), FLOATS))]

    mean = _scalar(code, code.fdiv(total(code, repeat(code, vectors, [spread(0.0)], add)[0]), count))

    def square(step: Value, held: list[Value]) -> list[Value]:
        apart = code.fsub(load(code, _at(code, row, step, 64), FLOATS), mean)
        return [code.fadd(held[0], code.fmul(apart, apart))]

    variance = code.fdiv(total(code, repeat(code, vectors, [spread(0.0)], square)[0]), count)
    root = call(code, "llvm.sqrt.f32", FLOAT, code.fadd(variance, FLOAT(EPSILON)))
    return mean, _scalar(code, code.fdiv(FLOAT(1.0), root))


def _normalise(code: Code, row: Value, vectors: Value, out: Value) -> None:
    mean, scale = _moments(code, row, vectors)

    def write(step: Value, _held: list[Value]) -> list[Value]:
        apart = code.fsub(load(code, _at(code, row, step, 64), FLOATS), mean)
        store_bf16(code, code.fmul(apart, scale), _at(code, out, step, 32))
        return []

    repeat(code, vectors, [], write)


def _norm_affine(code: Code, row: Value, vectors: Value, weight: Value, bias: Value) -> None:
    mean, scale = _moments(code, row, vectors)

    def write(step: Value, _held: list[Value]) -> list[Value]:
        place = _at(code, row, step, 64)
        normed = code.fmul(code.fsub(load(code, place, FLOATS), mean), scale)
        weighted = code.fmul(normed, load(code, _at(code, weight, step, 64), FLOATS))
        store(code, code.fadd(weighted, load(code, _at(code, bias, step, 64), FLOATS)), place)
        return []

    repeat(code, vectors, [], write)


def _narrow(code: Code, row: Value, vectors: Value, out: Value) -> None:
    def write(step: Value, _held: list[Value]) -> list[Value]:
        store_bf16(code, load(code, _at(code, row, step, 64), FLOATS), _at(code, out, step, 32))
        return []

    repeat(code, vectors, [], write)


def _add_scaled(code: Code, out: Value, row: Value, vectors: Value, factor: Value) -> None:
    factors = _scalar(code, factor)

    def write(step: Value, _held: list[Value]) -> list[Value]:
        place = _at(code, out, step, 64)
        more = code.fmul(factors, load(code, _at(code, row, step, 64), FLOATS))
        store(code, code.fadd(load(code, place, FLOATS), more), place)
        return []

    repeat(code, vectors, [], write)


def _add_scaled_bf16(code: Code, out: Value, row: Value, vectors: Value, factor: Value) -> None:
    factors = _scalar(code, factor)

    def write(step: Value, _held: list[Value]) -> list[Value]:
        place = _at(code, out, step, 64)
        more = code.fmul(factors, load_bf16(code, _at(code, row, step, 32)))
        store(code, code.fadd(load(code, place, FLOATS), more), place)
        return []

    repeat(code, vectors, [], write)


def _dot(code: Code, left: Value, right: Value, pairs: Value) -> Value:
    """A float: the sum over `pairs` pairs of bfloat16. What is behind them on the right may be anything finite."""

    def multiply(step: Value, held: list[Value]) -> list[Value]:
        ours = load_first(code, _at(code, left, step, 64), code.sub(pairs, code.mul(step, number(LANES))))
        return [multiply_pairs(code, held[0], code.bitcast(ours, PAIRS), load(code, _at(code, right, step, 64), PAIRS))]

    return total(code, repeat(code, vectors_of(code, pairs), [spread(0.0)], multiply)[0])


def _zero(code: Code, out: Value, vectors: Value) -> None:
    def write(step: Value, _held: list[Value]) -> list[Value]:
        store(code, spread(0.0), _at(code, out, step, 64))
        return []

    repeat(code, vectors, [], write)


def _set(code: Code, out: Value, row: Value, vectors: Value) -> None:
    def write(step: Value, _held: list[Value]) -> list[Value]:
        store(code, load(code, _at(code, row, step, 64), FLOATS), _at(code, out, step, 64))
        return []

    repeat(code, vectors, [], write)


def _buckets(code: Code, now: Value, times: Value, vectors: Value, out: Value) -> None:
    """models.blocks.time_bucket: floor(2 log2(1 + minutes)), half a second added.

    Read off the float's exponent, and off whether its mantissa reaches sqrt(2).
    """
    here = everywhere(code, now, INTS)

    def const(value: int) -> Value:
        return ir.Constant(INTS, [value] * LANES)

    def write(step: Value, _held: list[Value]) -> list[Value]:
        seconds = code.sub(here, load(code, _at(code, times, step, 64), INTS))
        seconds = code.select(code.icmp_signed(">", seconds, const(0)), seconds, const(0))
        minutes = code.fdiv(code.fadd(code.sitofp(seconds, FLOATS), spread(0.5)), spread(60.0))
        bits = code.bitcast(code.fadd(minutes, spread(1.0)), INTS)
        octave = code.sub(code.lshr(bits, const(23)), const(127))
        upper = code.icmp_unsigned(">=", code.and_(bits, const(0x7FFFFF)), const(MIDDLE))
        bucket = code.add(code.shl(octave, const(1)), code.zext(upper, INTS))
        top = const(TIME_BUCKETS - 1)
        bucket = code.select(code.icmp_signed("<", bucket, top), bucket, top)
        store(code, code.trunc(bucket, BYTES), _at(code, out, step, LANES))
        return []

    repeat(code, vectors, [], write)


def _bias(code: Code, positions: Value, buckets: Value, table: list[Value], step: Value) -> Value:
    """FLOATS: the bias of 16 keys; `table` holds the 48 biases of time in registers."""
    bucket = code.zext(load(code, _at(code, buckets, step, LANES), BYTES), INTS)
    low = call(code, "llvm.x86.avx512.vpermi2var.ps.512", FLOATS, table[0], bucket, table[1])
    high = call(code, "llvm.x86.avx512.permvar.sf.512", FLOATS, table[2], bucket)
    late = code.icmp_unsigned(">=", bucket, ir.Constant(INTS, [2 * LANES] * LANES))
    return code.fadd(code.select(late, high, low), load(code, _at(code, positions, step, 64), FLOATS))


def _below(code: Code, step: Value, count: Value, value: Value) -> Value:
    """The value in the lanes before `count`, counted from step 0, and FAR_BELOW in the others."""
    lane = ir.Constant(INTS, list(range(LANES)))
    left = code.trunc(code.sub(count, code.mul(step, number(LANES))), INT)
    return code.select(code.icmp_signed("<", lane, everywhere(code, left, INTS)), value, spread(FAR_BELOW))


def _times(code: Code, address: Value) -> list[Value]:
    return [load(code, code.add(address, number(64 * third)), FLOATS) for third in range(3)]


def _bias_row(
    code: Code, out: Value, positions: Value, buckets: Value, times: Value, vectors: Value, count: Value
) -> None:
    table = _times(code, times)

    def write(step: Value, _held: list[Value]) -> list[Value]:
        bias = _below(code, step, count, _bias(code, positions, buckets, table, step))
        store(code, bias, _at(code, out, step, 64))
        return []

    repeat(code, vectors, [], write)


def _powers(code: Code, scores: Value, out: Value, vectors: Value, largest: Value) -> Value:
    """Write bfloat16 2^(score - largest); a float, their sum."""
    peak = _scalar(code, largest)

    def write(step: Value, held: list[Value]) -> list[Value]:
        power = exp2(code, code.fsub(load(code, _at(code, scores, step, 64), FLOATS), peak))
        store_bf16(code, power, _at(code, out, step, 32))
        return [code.fadd(held[0], power)]

    return total(code, repeat(code, vectors, [spread(0.0)], write)[0])


def _history_softmax(
    code: Code, scores: Value, out: Value, vectors: Value, positions: Value, buckets: Value, times: Value, count: Value,
    factor: Value,
) -> None:  # fmt: skip
    table = _times(code, times)

    def biased(step: Value, held: list[Value]) -> list[Value]:
        place = _at(code, scores, step, 64)
        score = code.fadd(load(code, place, FLOATS), _bias(code, positions, buckets, table, step))
        score = _below(code, step, count, score)
        store(code, score, place)
        return [maximum(code, held[0], score)]

    largest = total(code, repeat(code, vectors, [spread(FAR_BELOW)], biased)[0], "fmax")
    store(code, code.fdiv(FLOAT(1.0), _powers(code, scores, out, vectors, largest)), factor)


def _candidate_softmax(
    code: Code, scores: Value, out: Value, vectors: Value, bias: Value, query: Value, key: Value, pairs: Value,
    own_bias: Value, aux: Value,
) -> None:  # fmt: skip
    own = code.fadd(_dot(code, query, key, pairs), load(code, own_bias, FLOAT))

    def biased(step: Value, held: list[Value]) -> list[Value]:
        place = _at(code, scores, step, 64)
        score = code.fadd(load(code, place, FLOATS), load(code, _at(code, bias, step, 64), FLOATS))
        store(code, score, place)
        return [maximum(code, held[0], score)]

    largest = total(code, repeat(code, vectors, [_scalar(code, own)], biased)[0], "fmax")
    weight = code.extract_element(exp2(code, _scalar(code, code.fsub(own, largest))), INT(0))
    whole = code.fadd(_powers(code, scores, out, vectors, largest), weight)
    store(code, code.fdiv(FLOAT(1.0), whole), aux)
    store(code, weight, code.add(aux, number(64)))


def _int_at(code: Code, address: Value) -> Value:
    return code.sext(load(code, address, INT, 4), INT64)


def _float_at(code: Code, address: Value) -> Value:
    return load(code, address, FLOAT, 4)


def _write(code: Code, address: Value, value: Value) -> None:
    store(code, value, address, 4)


def _emitted(count: int, emit: Any, *more: Any) -> Any:
    return emitted(types.void(*[types.intp] * count, *more), emit)


int_at = emitted(types.int64(types.intp), _int_at)
float_at = emitted(types.float32(types.intp), _float_at)
put_int = emitted(types.void(types.intp, types.int32), _write)
put_float = emitted(types.void(types.intp, types.float32), _write)
normalise = _emitted(3, _normalise)  # (row, vectors, out): bfloat16, no weight, no bias: both are folded into products
norm_affine = _emitted(4, _norm_affine)  # (row, vectors, weight, bias): in place, float32
narrow = _emitted(3, _narrow)  # (row, vectors, out): float32 to bfloat16
add_scaled = _emitted(3, _add_scaled, types.float32)  # (out, row, vectors, factor)
add_scaled_bf16 = _emitted(3, _add_scaled_bf16, types.float32)
dot = emitted(types.float32(types.intp, types.intp, types.intp), _dot)  # of bfloat16; (left, right, pairs)
zero = _emitted(2, _zero)  # (out, vectors)
set_row = _emitted(3, _set)  # (out, row, vectors)
history_softmax = _emitted(8, _history_softmax)
candidate_softmax = _emitted(9, _candidate_softmax)
bias_row = _emitted(6, _bias_row)  # (out, positions, buckets, times, vectors, count): FAR_BELOW from count on
buckets = emitted(types.void(types.int32, types.intp, types.intp, types.intp), _buckets)  # (now, times, vectors, out)
