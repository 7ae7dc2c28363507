"""Sums of parts added up, compiled by numba. In: what `routing_kernels.py` has split, and the answers. Out: sums.

Parts of a table are added in the order of their remainders, so that sums are the same to the bit whoever came first;
what is kept here is added last. Each line of the output is written once.
"""

from __future__ import annotations

from rankd.machine_code import floats_at, kernel, read, types, written
from rankd.shards.routing_kernels import ANSWER_AT, ANSWER_STRIDE, CELLS_AT
from rankd.types import Float32Array, Int32Array, Int64Array

FLOAT_BYTES = 4


@kernel(
    types.void(
        read(types.int64, 2, "C"),
        read(types.int64, 1, "C"),
        read(types.int64, 1, "C"),
        read(types.int32, 1, "C"),
        read(types.int64, 2, "C"),
        written(types.float32, 2),
    )
)
def add_up(
    pieces: Int64Array,
    firsts: Int64Array,
    answers: Int64Array,
    bags_of: Int32Array,
    columns: Int64Array,
    out: Float32Array,
) -> None:
    """Write the sums of B samples in F tables.

    Args:
        pieces: (P, PIECE_FIELDS) of all that was asked, by table and then by remainder.
        firsts: (F + 1,) the first piece of each table; answers: (P,) the address of the answer that each is in.
        bags_of: of `split`. columns: (F, 2) where the sums of each table begin in a line of out (B, W), and end.
    """
    for sample in range(out.shape[0]):
        for table in range(len(firsts) - 1):
            begin, end = columns[table, 0], columns[table, 1]
            line = out[sample, begin:end]
            first, last = firsts[table], firsts[table + 1]
            if first == last:
                line[:] = 0.0
            for number in range(first, last):
                piece = pieces[number]
                at = piece[ANSWER_AT] + bags_of[piece[CELLS_AT] + sample] * piece[ANSWER_STRIDE]
                sums = floats_at(answers[number] + at * FLOAT_BYTES, end - begin)
                if number == first:
                    for column in range(end - begin):
                        line[column] = sums[column]
                else:
                    for column in range(end - begin):
                        line[column] += sums[column]
