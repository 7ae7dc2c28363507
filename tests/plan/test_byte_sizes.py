"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.errors import ConfigError
from rankd.plan.byte_sizes import UNITS, read_bytes, show_bytes


@pytest.mark.parametrize(
    ("text", "size"), [("7", 7), ("7 B", 7), ("1.5KiB", 1536), ("2 mib", 2 * 1024**2), ("64GiB", 64 * 1024**3)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert read_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1 GB", "1e9", "1 GiB 2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="32GiB"):
        read_bytes(text)


def test_sizes_are_shown() -> None:
    assert [show_bytes(size) for size in (0, 1023, 1536, 1024**4)] == ["0 B", "1,023 B", "1.5 KiB", "1.0 TiB"]


@given(st.integers(0, 10**15))
def test_what_is_shown_is_read_to_the_digit_that_it_has(size: int) -> None:
    text = show_bytes(size).replace(",", "")
    unit = UNITS[text.split()[1]]
    assert abs(read_bytes(text) - size) <= 0.05 * unit + 1
