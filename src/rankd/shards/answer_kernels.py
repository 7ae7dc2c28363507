"""Sums of parts added up, compiled by numba. In: what `routing_kernels.py` has split, and the answers. Out: sums.

Parts of a table are added in the order of their remainders, so that sums are the same to the bit whoever came first;
what is kept here is added last. Each line of the output is written once. Sums in bfloat16 are the upper halves of
float32: a shard rounds to the nearest, of two the even one, and here zeros are put below them.
"""

from __future__ import annotations

import numpy as np

from rankd.machine_code import floats_at, kernel, read, shorts_at, types, written
from rankd.shards.routing_kernels import ANSWER_AT, ANSWER_STRIDE, CELLS_AT
from rankd.types import Array, Float32Array, Int32Array, Int64Array

FLOAT_BYTES, SHORT_BYTES = 4, 2
_LEAST_NAN = 0x7F800001


@kernel(
    types.void(
        read(types.int64, 2, "C"),
        read(types.int64, 1, "C"),
        read(types.int64, 1, "C"),
        read(types.boolean, 1, "C"),
        read(types.int32, 1, "C"),
        read(types.int64, 2, "C"),
        written(types.float32, 2),
    )
)
def add_up(
    pieces: Int64Array,
    firsts: Int64Array,
    answers: Int64Array,
    narrow: Array,
    bags_of: Int32Array,
    columns: Int64Array,
    out: Float32Array,
) -> None:
    """Write the sums of B samples in F tables.

    Args:
        pieces: (P, PIECE_FIELDS) of all that was asked, by table and then by remainder.
        firsts: (F + 1,) the first piece of each table; answers: (P,) the address of the answer that each is in.
        narrow: (P,) whether that answer is in bfloat16.
        bags_of: of `split`. columns: (F, 2) where the sums of each table begin in a line of out (B, W), and end.
    """
    bits, widened = out.view(np.uint32), np.empty(out.shape[1], np.float32)
    widened_bits = widened.view(np.uint32)
    for sample in range(out.shape[0]):
        for table in range(len(firsts) - 1):
            begin, end = columns[table, 0], columns[table, 1]
            line, line_bits = out[sample, begin:end], bits[sample, begin:end]
            first, last = firsts[table], firsts[table + 1]
            if first == last:
                line[:] = 0.0
            for number in range(first, last):
                piece = pieces[number]
                at = piece[ANSWER_AT] + bags_of[piece[CELLS_AT] + sample] * piece[ANSWER_STRIDE]
                if narrow[number]:
                    halves = shorts_at(answers[number] + at * SHORT_BYTES, end - begin)
                    into = line_bits if number == first else widened_bits
                    for column in range(end - begin):
                        into[column] = np.uint32(halves[column]) << np.uint32(16)
                    if number > first:
                        for column in range(end - begin):
                            line[column] += widened[column]
                    continue
                sums = floats_at(answers[number] + at * FLOAT_BYTES, end - begin)
                if number == first:
                    for column in range(end - begin):
                        line[column] = sums[column]
                else:
                    for column in range(end - begin):
                        line[column] += sums[column]


@kernel(types.void(read(types.uint32, 1, "C"), written(types.uint16, 1)))
def narrow_sums(bits: Array, out: Array) -> None:
    """Sums (n,) float32, given as their bits, in bfloat16 (n,). What is too large becomes infinite, NaN stays."""
    for place in range(len(bits)):
        number = bits[place]
        rounded = np.uint32((number + np.uint32(0x7FFF) + ((number >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
        quiet = np.uint32(number >> np.uint32(16)) | np.uint32(0x40)
        nan = (number & np.uint32(0x7FFFFFFF)) >= np.uint32(_LEAST_NAN)
        out[place] = np.uint16(quiet if nan else rounded)
