"""User states as the attention kernels read them: keys and values in pages of S tokens, and a table that finds them.

A page holds S tokens of one block of one user, of all layers. Worked example, S = 16: a block of 40 events has three
pages; event 37 lies in the third one, row 5. Pages are anywhere in the pool, in any order:

    table[user, block] = [7, 2, 9, ...]      event 37 is row 5 of page 9

Next: `kernels/triton_attention_steps.py` reads them, `kernels/triton_state_rows.py` writes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

FP8_LARGEST = 448.0  # of e4m3


class PageType(Enum):
    """How keys and values lie in pages. FP8 is e4m3 with a scale for each token, head, and of keys and of values."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP8 = "fp8"

    @property
    def dtype(self) -> torch.dtype:
        """Torch's name of the numbers."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[self.value]


@dataclass(frozen=True, slots=True)
class PagedStates:
    """P pages of S tokens of L layers, attention A = H x head wide, and the table of U users with N blocks each.

    keys_values (P, L, 2, S, A); scales (P, L, 2, S, H) float32, of fp8 alone, else empty; times (P, S) int32;
    table (U, N, M) int32: M pages at most a block.
    """

    keys_values: Tensor
    scales: Tensor
    times: Tensor
    table: Tensor

    @property
    def page(self) -> int:
        """S."""
        return self.keys_values.shape[3]

    @property
    def layers(self) -> int:
        """L."""
        return self.keys_values.shape[1]

    @property
    def fp8(self) -> bool:
        """Whether the numbers need their scales."""
        return self.keys_values.dtype is torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class StateShape:
    """N blocks, L layers, H heads, attention A wide; S tokens a page, at most M pages a block.

    `dtype` is that of the keys and values that calls make and the host keeps, `kind` is how they lie in pages.
    """

    blocks: int
    layers: int
    heads: int
    width: int
    page: int
    most_pages: int
    dtype: torch.dtype
    kind: PageType

    @property
    def longest(self) -> int:
        """Tokens of a block, at most."""
        return self.most_pages * self.page

    @property
    def pages_a_user(self) -> int:
        """Of the longest state."""
        return self.blocks * self.most_pages

    @property
    def page_bytes(self) -> int:
        """Of one page with its scales and times."""
        rows = self.layers * 2 * self.page
        scales = rows * self.heads * 4 if self.kind is PageType.FP8 else 0
        return rows * self.width * self.kind.dtype.itemsize + scales + self.page * 4


def pages_of(tokens: int, page: int) -> int:
    """How many pages hold so many tokens.

    >>> pages_of(40, 16), pages_of(0, 16)
    (3, 0)
    """
    return -(-tokens // page)
