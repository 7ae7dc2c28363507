"""Ids of a request split over the parts of their tables, in one pass and without the interpreter's lock.

In: ids (`JaggedIds`), and where each part is (`routing.py`). Out: pieces, one for each part of a table that has any of
the ids; then the payloads of all calls, byte by byte as `pool_frames.py` says. `answer_kernels.py` adds up what comes.

A bag is what one sample has in one piece. Bags that are the same are sent, summed and answered once, which is worth
most where a table is split, and most bags of a piece are empty. Worked example, a table of 7 rows split by 2, samples
[6, 3], [4], [6, 1] and [3]:

    remainder 0    rows [3] [2] [3] []    bags_of 0 1 0 2, samples that are sent: 0, 1, 3
    remainder 1    rows [1] [] [0] [1]    bags_of 0 1 2 0, samples that are sent: 0, 1, 2
"""

from __future__ import annotations

import numpy as np

from rankd.machine_code import kernel, part, read, store, types, written
from rankd.types import Array, Int32Array, Int64Array

# Of a table: how many rows, split by what, and the first of its places; then one place for each remainder, and a last
# one for the rows that are kept here.
ROWS, MODULUS, FIRST_PLACE, KEPT_AT, KEPT_MASK = range(5)
TABLE_FIELDS = 5
# Of a place: who is called, in which net and for which part of it, bytes of an id, numbers of a row.
CALLED, NET, PART, ID_BYTES, DIM = range(5)
PLACE_FIELDS = 5
# Of a piece: the table's position among those asked, the remainder, its place; where its ids begin in `rows`, and its
# bags in `starts`, `bags_of` and `sent`; how many bags and ids are sent, how many samples are said to be, bytes of a
# count; where in the answer its sums begin, in numbers, and how many lie from one sample to the next.
POSITION, REMAINDER, PLACE, ROWS_AT, CELLS_AT, BAGS, IDS, SAMPLES, COUNT_BYTES, ANSWER_AT, ANSWER_STRIDE = range(11)
PIECE_FIELDS = 11
# Of a call: who is called, the pieces first..end - 1, the payload begin..end - 1, the numbers of its answer.
CALL, FIRST, END, BYTES_BEGIN, BYTES_END, NUMBERS = range(6)
CALL_FIELDS = 6

TRIED = 64
"""Where so many bags are all different the others are not compared: in tables of many rows it would be for nothing."""
STEP, STEPS = 64, 8
"""The number of bags is rounded up to STEP, and to an eighth of the samples: pieces with the same number share a block,
and each block costs a shard tens of microseconds."""
_PROBES = 8
_EMPTY = -1
_REQUEST_BYTES, _BLOCK_BYTES, _PART_BYTES = 4, 8, 8
_FIRST_PRIME, _LAST_PRIME = 0x9E3779B97F4A7C15 - (1 << 64), 0xC2B2AE3D27D4EB4F - (1 << 64)  # as int64


@part
def spread(number: int) -> int:
    """A number as a hash, not negative."""
    mixed = number * _FIRST_PRIME
    return (mixed ^ (mixed >> 32)) & 0x7FFFFFFFFFFFFFFF


@part
def _find_owners(ids: Int64Array, table: Int64Array, kept_rows: Int64Array, owners: Array, inner: Int64Array) -> None:
    """Of the ids of a table the remainder and the row in that part, or the modulus and the row among those kept."""
    modulus, mask, kept_at = table[MODULUS], table[KEPT_MASK], table[KEPT_AT]
    inverse = 1.0 / modulus  # to divide integers takes several times as long
    for at in range(len(ids)):
        own = int(ids[at] * inverse)
        owner = ids[at] - own * modulus
        while owner < 0:
            own, owner = own - 1, owner + modulus
        while owner >= modulus:
            own, owner = own + 1, owner - modulus
        inner[at], owners[at] = own, owner
    if mask >= 0:
        for at in range(len(ids)):
            place = spread(ids[at]) & mask
            while kept_rows[kept_at + place, 0] != ids[at] and kept_rows[kept_at + place, 0] >= 0:
                place = (place + 1) & mask
            if kept_rows[kept_at + place, 0] >= 0:
                inner[at], owners[at] = kept_rows[kept_at + place, 1], modulus


@part
def _deal(
    offsets: Int64Array, owners: Array, inner: Int64Array, next_places: Array, starts: Int64Array, rows: Int64Array
) -> None:
    """Put the ids of a table in the order of their owners: `starts` (modulus + 1, B + 1) of each one's bags in `rows`,
    of which those of the table begin at offsets[0]; `next_places` (modulus + 1,) is room."""
    samples, first = len(offsets) - 1, offsets[0]
    starts[:, :] = 0
    for sample in range(samples):
        for at in range(offsets[sample] - first, offsets[sample + 1] - first):
            starts[owners[at], sample + 1] += 1
    begin = first
    for owner in range(len(starts)):
        next_places[owner] = begin - first
        for sample in range(samples + 1):
            begin += starts[owner, sample]
            starts[owner, sample] = begin
    mine = rows[first:begin]
    for at in range(len(inner)):
        owner = owners[at]
        mine[next_places[owner]] = inner[at]
        next_places[owner] += np.uint64(1)


@part
def _same_bag(rows: Int64Array, first: int, second: int, count: int) -> bool:
    at = 0
    while at < count and rows[first + at] == rows[second + at]:
        at += 1
    return at == count


@part
def _find_bags(rows: Int64Array, starts: Int64Array, samples: int, seen: Int32Array, bags_of: Int32Array) -> int:
    """Number the bags of a piece, the same ones alike; how many there are. `seen` (a power of two,) is a hash table."""
    seen[:] = _EMPTY
    mask, bags = len(seen) - 1, 0
    for sample in range(samples):
        if sample == TRIED and bags == TRIED:
            return samples
        begin, count = starts[sample], starts[sample + 1] - starts[sample]
        mixed = count
        if count:
            mixed += rows[begin] * _LAST_PRIME + rows[begin + count - 1]
        place, found = spread(mixed) & mask, False
        for _ in range(_PROBES):
            other = seen[place]
            if other == _EMPTY:
                seen[place] = sample
                break
            if starts[other + 1] - starts[other] == count and _same_bag(rows, starts[other], begin, count):
                bags_of[sample], found = bags_of[other], True
                break
            place = (place + 1) & mask
        if not found:
            bags_of[sample] = bags
            bags += 1
    return bags


@part
def _fill_piece(
    piece: Int64Array,
    rows: Int64Array,
    starts: Int64Array,
    samples: int,
    seen: Int32Array,
    bags_of: Int32Array,
    sent: Int32Array,
) -> None:
    """Which bags of a piece are sent, and how many ids and bytes of a count that makes."""
    bags = _find_bags(rows, starts, samples, seen, bags_of)
    said = 1
    if bags > 1:
        step = max((samples + STEPS - 1) // STEPS, STEP)
        said = (bags + step - 1) // step * step
    if said >= samples:
        bags = said = samples
        for sample in range(samples):
            bags_of[sample] = sample
    following, ids, most, least = 0, 0, 0, starts[1] - starts[0]
    for sample in range(samples):
        if bags_of[sample] == following:
            sent[following] = sample
            following += 1
            count = starts[sample + 1] - starts[sample]
            ids, most, least = ids + count, max(most, count), min(least, count)
    piece[BAGS], piece[IDS], piece[SAMPLES] = bags, ids, said
    if most == least and bags == said:
        piece[COUNT_BYTES] = 0
    else:
        piece[COUNT_BYTES] = 1 if most < 1 << 8 else 2 if most < 1 << 16 else 4


@part
def _first_outside(ids: Int64Array, first: int, end: int, rows: int) -> int:
    """The place of the first id that is no row; `end` if there is none."""
    least, most = 0, 0
    for row in ids[first:end]:  # without a way out, so that it is compiled to vectors
        least, most = min(least, row), max(most, row)
    if least < 0 or most >= rows:
        for at in range(first, end):
            if ids[at] < 0 or ids[at] >= rows:
                return at
    return end


_LONGS, _MANY_LONGS = read(types.int64, 1, "C"), read(types.int64, 2, "C")


@kernel(
    types.int64(
        _LONGS,
        _LONGS,
        _LONGS,
        _MANY_LONGS,
        _MANY_LONGS,
        types.int64,
        types.int64,
        types.int64,
        written(types.int64, 1),
        written(types.int64, 1),
        written(types.int32, 1),
        written(types.int32, 1),
        written(types.int64, 2),
    )
)
def split(
    asked: Int64Array,
    offsets: Int64Array,
    ids: Int64Array,
    tables: Int64Array,
    kept_rows: Int64Array,
    position: int,
    rows_at: int,
    cells_at: int,
    rows: Int64Array,
    starts: Int64Array,
    bags_of: Int32Array,
    sent: Int32Array,
    pieces: Int64Array,
) -> int:
    """Split ids of B samples in F tables; how many pieces there are, or -1 - place of an id that its table has not.

    Args:
        asked: (F,) numbers of tables, the first of them at `position` of those asked; offsets, ids: of `JaggedIds`.
        tables: (T, TABLE_FIELDS); kept_rows: (H, 2) hash tables of rows that are kept here, and their places there.
        rows_at: where these `rows` (N,), ids in the part by piece and sample, begin in those of all that is asked.
        cells_at: where in the following arrays there is room for B + 1 numbers for each place of each table asked.
        starts: of each bag in these `rows`; bags_of: of each sample; sent: of each bag a sample that has it.
        pieces: (places, PIECE_FIELDS), those that have any ids.
    """
    count, samples = 0, (len(offsets) - 1) // max(len(asked), 1)
    size = 2
    while size < 2 * samples:
        size *= 2
    seen = np.empty(size, np.int32)
    owners, inner = np.empty(len(ids), np.uint32), np.empty(len(ids), np.int64)
    for number in range(len(asked)):
        table = tables[asked[number]]
        own = offsets[number * samples : (number + 1) * samples + 1]
        first, end = own[0], own[samples]
        wrong = _first_outside(ids, first, end, table[ROWS])
        if wrong < end:
            return -1 - wrong
        places, cells = table[MODULUS] + 1, samples + 1
        here = starts[cells_at : cells_at + places * cells].reshape(places, cells)
        whole = places == 2 and table[KEPT_MASK] < 0
        if whole:
            here[0, :], rows[first:end] = own, ids[first:end]
        elif end > first:
            _find_owners(ids[first:end], table, kept_rows, owners[: end - first], inner[: end - first])
            next_places = np.empty(places, np.uint64)
            _deal(own, owners[: end - first], inner[: end - first], next_places, here, rows)
        for place in range(places):
            if end > first and not (whole and place) and here[place, samples] > here[place, 0]:
                at = cells_at + place * cells
                piece = pieces[count]
                piece[POSITION], piece[REMAINDER], piece[PLACE] = position + number, place, table[FIRST_PLACE] + place
                piece[ROWS_AT], piece[CELLS_AT] = rows_at, at
                _fill_piece(piece, rows, here[place], samples, seen, bags_of[at : at + cells], sent[at : at + cells])
                count += 1
        cells_at += places * cells
    return count


@kernel(types.void(_LONGS, written(types.int64, 2)))
def index_rows(rows: Int64Array, index: Int64Array) -> None:
    """Write the hash table of rows that are kept, and of their places: `index` (a power of two, 2), all -1."""
    mask = len(index) - 1
    for at in range(len(rows)):
        place = spread(rows[at]) & mask
        while index[place, 0] >= 0:
            place = (place + 1) & mask
        index[place, 0], index[place, 1] = rows[at], at


@kernel(types.int64(written(types.int64, 2), _MANY_LONGS, written(types.int64, 2)))
def lay_out(pieces: Int64Array, places: Int64Array, calls: Int64Array) -> int:
    """Say where each piece goes in the payloads and answers; how many calls there are.

    Args:
        pieces: in the order of their calls, and in a call of their samples: those of as many samples are a block.
        places: (P, PLACE_FIELDS). calls: (most calls, CALL_FIELDS); their payloads lie one after the other.
    """
    count, end = 0, 0
    first = 0
    while first < len(pieces):
        called, last, answer = places[pieces[first, PLACE], CALLED], first, 0
        begin, end = end, end + _REQUEST_BYTES
        while last < len(pieces) and places[pieces[last, PLACE], CALLED] == called:
            samples, block, width = pieces[last, SAMPLES], last, 0
            end += _BLOCK_BYTES
            while (
                last < len(pieces)
                and places[pieces[last, PLACE], CALLED] == called
                and pieces[last, SAMPLES] == samples
            ):
                piece, place = pieces[last], places[pieces[last, PLACE]]
                piece[ANSWER_AT] = answer + width
                width += place[DIM]
                end += _PART_BYTES + piece[COUNT_BYTES] * samples + piece[IDS] * place[ID_BYTES]
                last += 1
            pieces[block:last, ANSWER_STRIDE] = width
            answer += samples * width
        call = calls[count]
        call[CALL], call[FIRST], call[END] = called, first, last
        call[BYTES_BEGIN], call[BYTES_END], call[NUMBERS] = begin, end, answer
        count, first = count + 1, last
    return count


@part
def _put(out: Array, at: int, number: int, size: int) -> int:
    """Write a number in so many bytes, the low ones first; where the next one goes."""
    for byte in range(size):
        out[at + byte] = (number >> (8 * byte)) & 255
    return at + size


@part
def _put_ids(out: Array, at: int, rows: Int64Array, size: int) -> int:
    """The same for several, of 2, 4 or 8 bytes."""
    address = out.ctypes.data + at
    if size == 2:
        for number in range(len(rows)):
            store(address + number * 2, np.uint16(rows[number]))
    elif size == 4:
        for number in range(len(rows)):
            store(address + number * 4, np.uint32(rows[number]))
    else:
        for number in range(len(rows)):
            store(address + number * 8, np.uint64(rows[number]))
    return at + len(rows) * size


@part
def _put_headers(out: Array, at: int, pieces: Int64Array, places: Int64Array) -> int:
    """Of a call with these pieces."""
    blocks = 1
    for number in range(1, len(pieces)):
        blocks += pieces[number, SAMPLES] != pieces[number - 1, SAMPLES]
    at = _put(out, at, places[pieces[0, PLACE], NET], 2)
    at = _put(out, at, blocks, 2)
    last = 0
    for number in range(len(pieces)):
        piece, place = pieces[number], places[pieces[number, PLACE]]
        if number == last:
            while last < len(pieces) and pieces[last, SAMPLES] == piece[SAMPLES]:
                last += 1
            at = _put(out, at, piece[SAMPLES], 4)
            at = _put(out, at, last - number, 4)  # uint16, and 0
        at = _put(out, at, place[PART], 2)
        at = _put(out, at, piece[COUNT_BYTES], 1)
        at = _put(out, at, place[ID_BYTES], 1)
        at = _put(out, at, piece[IDS], 4)
    return at


@kernel(
    types.void(
        _MANY_LONGS,
        _MANY_LONGS,
        _MANY_LONGS,
        _LONGS,
        _LONGS,
        read(types.int32, 1, "C"),
        written(types.uint8, 1),
    )
)
def write_payloads(
    pieces: Int64Array,
    places: Int64Array,
    calls: Int64Array,
    rows: Int64Array,
    starts: Int64Array,
    sent: Int32Array,
    out: Array,
) -> None:
    """Write the payloads of all calls, as `lay_out` has said."""
    for call in calls:
        at = _put_headers(out, call[BYTES_BEGIN], pieces[call[FIRST] : call[END]], places)
        for number in range(call[FIRST], call[END]):
            piece, id_bytes = pieces[number], places[pieces[number, PLACE], ID_BYTES]
            own, bags = rows[piece[ROWS_AT] :], sent[piece[CELLS_AT] : piece[CELLS_AT] + piece[BAGS]]
            begins = starts[piece[CELLS_AT] :]
            if piece[COUNT_BYTES]:
                for sample in bags:
                    at = _put(out, at, begins[sample + 1] - begins[sample], piece[COUNT_BYTES])
                for _ in range(piece[BAGS], piece[SAMPLES]):
                    at = _put(out, at, 0, piece[COUNT_BYTES])
            if bags[-1] == piece[BAGS] - 1:  # they are the first samples, whose ids lie side by side
                at = _put_ids(out, at, own[begins[0] : begins[piece[BAGS]]], id_bytes)
            else:
                for sample in bags:
                    at = _put_ids(out, at, own[begins[sample] : begins[sample + 1]], id_bytes)
