"""The memory that a ranker shares with the processes of its engines: both see the same; what is unused goes back."""

from __future__ import annotations

import os

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rankd.engine.processes.shared_file import PAGE, SharedFile, SharedView


@given(st.lists(st.integers(0, 3 * PAGE), min_size=1, max_size=12), st.data())
def test_both_sides_see_the_same(sizes: list[int], data: st.DataObject) -> None:
    file = SharedFile()
    view = SharedView(file.descriptor)
    for number, size in enumerate(sizes):
        memory = file.allocate(size)
        assert memory.nbytes == size
        assert not memory.any()
        start = data.draw(st.integers(0, size))
        part = memory[start:]
        part[...] = number + 1
        offset = file.offset_of(part)
        assert offset is not None
        seen = view.array(offset, "|u1", part.shape)
        np.testing.assert_array_equal(seen, part)
        seen[...] = 77
        assert (part == 77).all()
    file.close()


def test_arrays_that_lie_elsewhere_are_told_apart() -> None:
    file = SharedFile()
    assert file.offset_of(np.zeros(10)) is None
    memory = file.allocate(PAGE)
    assert file.offset_of(np.zeros(10)) is None
    assert file.offset_of(memory[8:16].view(np.float64)) == 8
    file.close()
    file.close()


def test_what_is_not_used_any_more_gives_its_pages_back() -> None:
    file = SharedFile()
    kept = file.allocate(PAGE)
    kept[...] = 1
    for _ in range(20):
        memory = file.allocate(64 * PAGE)
        memory[...] = 2
        del memory
    assert file.offset_of(kept) == 0  # which also looks after what has gone
    assert os.fstat(file.descriptor).st_blocks * 512 <= 2 * PAGE
    assert (kept == 1).all()
    file.close()


def test_an_offset_of_a_larger_file_is_seen_too() -> None:
    file = SharedFile()
    view = SharedView(file.descriptor)
    first = file.allocate(8)
    first.view(np.int64)[0] = 5
    seen = view.array(0, "<i8", (1,))
    second = file.allocate(8)
    second.view(np.int64)[0] = 6
    offset = file.offset_of(second)
    assert offset == PAGE
    assert (view.array(offset, "<i8", (1,))[0], seen[0], view.array(0, "<i8", (1,))[0]) == (6, 5, 5)
    file.close()
