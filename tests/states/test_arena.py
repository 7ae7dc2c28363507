"""The arena: slabs never overlap, the budget is never exceeded, whatever is taken and given back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.errors import ConfigError
from rankd.states.arena import Arena, Slab, aligned

SIZES = st.lists(st.integers(1, 5000), min_size=1, max_size=4, unique_by=aligned)


@given(sizes=SIZES, budget=st.integers(0, 40_000), choices=st.lists(st.integers(0, 10_000), max_size=80))
def test_slabs_are_apart_and_within_the_budget(sizes: list[int], budget: int, choices: list[int]) -> None:
    if budget < aligned(max(sizes)):
        with pytest.raises(ConfigError, match="one state of this model takes"):
            Arena(budget, sizes)
        return
    arena = Arena(budget, sizes)
    assert arena.capacity_bytes <= budget
    taken: list[tuple[Slab, int]] = []
    for number, choice in enumerate(choices):
        if choice % 3 == 0 and taken:
            slab, mark = taken.pop(choice % len(taken))
            assert (arena.bytes_of(slab) == mark).all()
            arena.give(slab)
            continue
        size = sizes[choice % len(sizes)]
        got = arena.take(size)
        if got is None:
            continue
        assert got.size >= size
        arena.bytes_of(got)[...] = number % 251
        taken.append((got, number % 251))
        assert arena.used_bytes <= arena.capacity_bytes
    for slab, mark in taken:  # nobody wrote over another one's bytes
        assert (arena.bytes_of(slab) == mark).all()
        arena.give(slab)
    assert arena.used_bytes == 0
    fresh = [arena.take(max(sizes)) for _ in range(budget // aligned(max(sizes)))]
    assert None not in fresh  # everything that was given back can become any size again


def test_new_memory_is_zero() -> None:
    arena = Arena(1 << 20, [1000])
    slab = arena.take(1000)
    assert slab is not None
    assert not np.any(arena.bytes_of(slab))
