"""A look-up that several threads share, compiled: from its first span to its last none of them needs the interpreter.

In: a *job*, cells that say where the arrays of a look-up lie, and *mailboxes* of helpers. Out: sums. A mailbox has

    STATE    ASLEEP   the helper sleeps, outside of this file
             AWAKE    it looks into the mailbox again and again
             ASKED    there is a job, which it has not seen yet
             AT_WORK  it takes spans of the job
             DONE     there are none left
             CLOSED   it is to end
    JOB      the address of the job
    FOUND    what the helper has found, as `sum_bags` returns

Next: `lookup_threads.py`.
"""

from __future__ import annotations

from rankd.embeddings.atomic_cells import add, give_way, put, swap, take
from rankd.embeddings.table_kernels import sum_bags
from rankd.embeddings.table_layout import FIELDS
from rankd.machine_code import floats_at, ints_at, kernel, part, read, types
from rankd.types import Int64Array

ASLEEP, AWAKE, ASKED, AT_WORK, DONE, CLOSED = range(6)
STATE, JOB, FOUND = range(3)
MAILBOX_CELLS = 8
"""A cache line."""
TAKEN, TABLES, NUM_TABLES, OFFSETS, IDS, CUTS, NUM_SPANS, OUT, SAMPLES, WIDTH = range(10)
"""Cells of a job: how many spans were taken; where the arrays of `sum_bags` lie, and their sizes; span s is of the bags
from cuts[s] up to cuts[s + 1]."""
JOB_CELLS = 10
_BYTES = 8


@part
def _least(one: int, other: int) -> int:
    """The first of two places, of which -1 is none."""
    return other if one < 0 else one if other < 0 else min(one, other)


@kernel(types.int64(types.int64))
def take_spans(job: int) -> int:
    """Sum spans until none is left; as `sum_bags` returns, of those taken here."""
    cells = ints_at(job, JOB_CELLS)
    bags, num_spans = cells[NUM_TABLES] * cells[SAMPLES], cells[NUM_SPANS]
    tables = ints_at(cells[TABLES], cells[NUM_TABLES] * FIELDS).reshape(cells[NUM_TABLES], FIELDS)
    offsets, cuts = ints_at(cells[OFFSETS], bags + 1), ints_at(cells[CUTS], num_spans + 1)
    ids = ints_at(cells[IDS], offsets[bags])
    out = floats_at(cells[OUT], cells[SAMPLES] * cells[WIDTH]).reshape(cells[SAMPLES], cells[WIDTH])
    found = -1
    span = add(job + TAKEN * _BYTES, 1)
    while span < num_spans:
        found = _least(found, sum_bags(tables, offsets, ids, cuts[span], cuts[span + 1], out))
        span = add(job + TAKEN * _BYTES, 1)
    return found


@kernel(types.int64(types.int64, read(types.int64, 1, "C")))
def sum_shared(job: int, mailboxes: Int64Array) -> int:
    """Do a job with the helpers of these mailboxes; as `sum_bags` returns, of all spans. Who has not begun when all
    spans are taken is not waited for."""
    for mailbox in mailboxes:
        put(mailbox + JOB * _BYTES, job)
        swap(mailbox, AWAKE, ASKED)
    found = take_spans(job)
    for mailbox in mailboxes:
        state = take(mailbox)
        if state == ASKED and not swap(mailbox, ASKED, AWAKE):
            state = AT_WORK
        if state in (AT_WORK, DONE):
            while take(mailbox) != DONE:
                give_way()
            found = _least(found, take(mailbox + FOUND * _BYTES))
            put(mailbox, AWAKE)
    return found


@kernel(types.int64(types.int64, types.int64))
def help_out(mailbox: int, turns: int) -> int:
    """Do the jobs of a mailbox, until there was none for so many turns or it was closed: ASLEEP or CLOSED."""
    left, state = turns, AWAKE
    while state not in (ASLEEP, CLOSED):
        state = take(mailbox)
        if state == ASKED and swap(mailbox, ASKED, AT_WORK):
            put(mailbox + FOUND * _BYTES, take_spans(take(mailbox + JOB * _BYTES)))
            put(mailbox, DONE)
            left = turns
        give_way()
        left -= 1
        if left < 0 and swap(mailbox, AWAKE, ASLEEP):
            state = ASLEEP
    return state


@kernel(types.boolean(types.int64, types.int64, types.int64))
def change(mailbox: int, expected: int, state: int) -> bool:
    """Give a mailbox a state if it has the one that is expected; whether it had."""
    return swap(mailbox, expected, state)
