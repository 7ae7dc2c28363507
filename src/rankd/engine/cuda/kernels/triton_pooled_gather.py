"""Embeddings of events and candidates: rows of all columns are looked up, summed, and normalised, in one kernel.

    token = norm( sum of table rows + numbers @ weight^T + what was added + the user's vector )

All tables lie in one, one after the other: a column says where its own starts and how many rows it has. An id outside
of them reads row 0 of its table, as padding does.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from rankd.engine.cuda.kernels.triton_pieces import config, narrowed, room_of, tiles_of, tuned
from rankd.engine.cuda.kernels.triton_projection import EPSILON

CONFIGS = (config(4, 1, block_rows=16), *(config(w, 1, block_rows=rows) for rows, w in ((4, 4), (8, 4), (8, 8))))


@dataclass(frozen=True, slots=True)
class Pooling:
    """tables (rows, D); starts and sizes (K,) int32: column k has ids 0..sizes[k] - 1 from row starts[k] on.

    weight (E, D) float32 of the numbers, or None; norm (2, D) float32: weight, then bias, or None for none.
    """

    tables: Tensor
    starts: Tensor
    sizes: Tensor
    weight: Tensor | None = None
    norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PoolingRows:
    """What is pooled: ids (G, R, K) int32; counts (G,) int32; numbers (G, R, E) float32; added (G, R, D) float32;
    users (U, D) float32 and user_of (R,) int32: whose vector joins each row. None: there is nothing of it."""

    ids: Tensor
    counts: Tensor
    numbers: Tensor | None = None
    added: Tensor | None = None
    users: Tensor | None = None
    user_of: Tensor | None = None


@tuned(CONFIGS, key=("WIDTH", "COLUMNS", "capacity"))
@triton.jit
def _pool(
    out, tables, starts, sizes, weight, norm, ids, counts, numbers, added, users, user_of, capacity, out_group, epsilon,
    WIDTH: tl.constexpr, ROOM: tl.constexpr, COLUMNS: tl.constexpr, NUMBERS: tl.constexpr, ADDED: tl.constexpr,
    USERS: tl.constexpr, NORMED: tl.constexpr, COPIES: tl.constexpr, block_rows: tl.constexpr,
):  # fmt: skip
    """A tile of whole rows of one group, written COPIES times."""
    group = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + group)
    row, column = tl.program_id(0) * block_rows + tl.arange(0, block_rows), tl.arange(0, ROOM)
    real, wide = row < count, column < WIDTH
    inside = real[:, None] & wide[None, :]
    seat = group * capacity + row
    token = tl.zeros((block_rows, ROOM), tl.float32)
    for index in range(COLUMNS):
        known = tl.load(ids + seat * COLUMNS + index, mask=real, other=0)
        known = tl.where((known >= 0) & (known < tl.load(sizes + index)), known, 0) + tl.load(starts + index)
        token += tl.load(tables + known.to(tl.int64)[:, None] * WIDTH + column[None, :], inside, 0.0).to(tl.float32)
    for index in range(NUMBERS):
        number = tl.load(numbers + seat * NUMBERS + index, mask=real, other=0.0)
        token += number[:, None] * tl.load(weight + index * WIDTH + column, mask=wide, other=0.0)[None, :]
    if ADDED:
        token += tl.load(added + seat[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
    if USERS:
        user = tl.load(user_of + row, mask=real, other=0).to(tl.int64)
        token += tl.load(users + user[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
    if NORMED:
        rest = tl.where(inside, token - (tl.sum(token, 1) / WIDTH)[:, None], 0.0)
        token = rest * (1.0 / tl.sqrt(tl.sum(rest * rest, 1) / WIDTH + epsilon))[:, None]
        token = token * tl.load(norm + column, mask=wide, other=0.0)[None, :]
        token += tl.load(norm + WIDTH + column, mask=wide, other=0.0)[None, :]
    for copy in range(COPIES):
        target = out + (group + copy) * out_group + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        tl.store(target, narrowed(token, out.dtype.element_ty), mask=inside)


def pool(out: Tensor, pooling: Pooling, rows: PoolingRows) -> None:
    """Write out (G, R, D); with one group of rows and more of `out` each of those gets the same tokens."""
    groups, capacity, columns = rows.ids.shape
    width = out.shape[-1]
    numbers = 0 if pooling.weight is None else pooling.weight.shape[0]
    nothing = out  # an address that is not read

    def there(tensor: Tensor | None) -> Tensor:
        return nothing if tensor is None else tensor

    _pool[lambda chosen: (tiles_of(capacity, chosen["block_rows"]), groups)](
        out, pooling.tables, pooling.starts, pooling.sizes, there(pooling.weight), there(pooling.norm), rows.ids,
        rows.counts, there(rows.numbers), there(rows.added), there(rows.users), there(rows.user_of), capacity,
        out.stride(0), EPSILON, WIDTH=width, ROOM=room_of(width), COLUMNS=columns, NUMBERS=numbers,
        ADDED=rows.added is not None, USERS=rows.users is not None, NORMED=pooling.norm is not None,
        COPIES=out.shape[0] if groups == 1 else 1,
    )  # fmt: skip
