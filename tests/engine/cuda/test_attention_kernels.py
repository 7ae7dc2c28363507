"""Attention kernels in Triton's interpreter against plain torch: ragged users, odd and empty shapes, every storage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankd.engine.cuda.kernels.triton_attention_steps import TILE_COLUMNS, Weighting
from rankd.engine.cuda.kernels.triton_candidate_attention import CandidateRows, attend_candidates
from rankd.engine.cuda.kernels.triton_history_attention import HistoryRows, attend_history
from rankd.engine.cuda.kernels.triton_state_rows import store_rows
from rankd.engine.cuda.paged_states import PageType
from tests.engine.cuda.plain_attention import ON_GPU, PAGE, Sizes, attention, rows_in, states_of, tables_of

BLOCK = PAGE
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
"""Largest error over the largest number: rounding of what comes in is the same on both sides."""
STORAGES = [(PageType.FP32, torch.float32), (PageType.BF16, torch.bfloat16), (PageType.FP8, torch.bfloat16)]
SMALL = [Sizes(2, 2, 1), Sizes(1, 1, 1, 24, 3), Sizes(2, 1, 2, 8, 40)]
SIZES = st.sampled_from([*SMALL, Sizes(2, 2, 4, 64, 300), Sizes(1, 2, 2, 128, 200)] if ON_GPU else SMALL)
MOST = 300 if ON_GPU else 37
USERS = st.lists(st.tuples(st.integers(0, MOST), st.integers(0, MOST)), min_size=1, max_size=2)


def tiles_over(counts: list[int]) -> list[list[int]]:
    """Tiles of one block: `counts` rows of each user, one after the other, and an empty tile."""
    tiles, first = [], 0
    for user, count in enumerate(counts):
        tiles += [[user, first + s, s, min(BLOCK, count - s)] for s in range(0, count, BLOCK)]
        first += count
    return [*tiles, [-1, 0, 0, 0]]


def close(made: Tensor, expected: Tensor, bound: float) -> None:
    """The largest difference, over the largest number."""
    scale = max(float(expected.abs().max()), 1e-3) if expected.numel() else 1.0
    assert float((made.double() - expected).abs().amax() if expected.numel() else 0.0) <= bound * scale


def padded(tiles: list[list[list[int]]]) -> Tensor:
    """Tiles of all blocks with as many for each; the others are empty."""
    most = max(len(block) for block in tiles)
    return torch.tensor([[*block, *[[-1, 0, 0, 0]] * (most - len(block))] for block in tiles], dtype=torch.int32)


@pytest.mark.parametrize(("kind", "dtype"), STORAGES, ids=[kind.value for kind, _ in STORAGES])
@pytest.mark.parametrize("weighting", Weighting, ids=lambda w: w.value)
@settings(max_examples=2, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(users=USERS, sizes=SIZES, biased=st.booleans(), data=st.data())
def test_candidates_see_the_history_and_themselves(
    kind: PageType, dtype: torch.dtype, weighting: Weighting, users: list[tuple[int, int]], sizes: Sizes, biased: bool,
    data: st.DataObject,
) -> None:  # fmt: skip
    torch.manual_seed(data.draw(st.integers(0, 100)))
    counts = data.draw(st.lists(st.integers(0, 19), min_size=len(users), max_size=len(users)))
    lengths = torch.tensor([user[: sizes.blocks] for user in users], dtype=torch.int32)
    states, tables = states_of(sizes, lengths, kind), tables_of(sizes, weighting, biased)
    now = torch.randint(10**6, 3 * 10**6, (len(users),), dtype=torch.int32)
    qkv = torch.randn(sizes.blocks, sum(counts) + 3, 3 * sizes.width).to(dtype)
    out = torch.full((*qkv.shape[:2], sizes.width), 7.0, dtype=dtype)
    tiles = torch.tensor(tiles_over(counts), dtype=torch.int32)
    assert tiles.shape[1] == TILE_COLUMNS
    layer = sizes.layers - 1
    attend_candidates(out, qkv, CandidateRows(tiles, lengths, now, BLOCK), states, tables, layer)
    for block in range(sizes.blocks):
        first = 0
        for user, count in enumerate(counts):
            length = int(lengths[user, block])
            keys, values, then = rows_in(states, user, block, layer, length)
            q, k, v = qkv[block, first : first + count].chunk(3, -1)
            distance = torch.cat([length - torch.arange(length), torch.zeros(1)]).long().expand(count, -1)
            seconds = torch.cat([now[user] - then, torch.zeros(1, dtype=torch.int32)]).expand(count, -1)
            all_keys, all_values = (
                torch.cat([known.expand(count, *known.shape), own.double()[:, None]], 1)
                for known, own in ((keys, k), (values, v))
            )
            expected = attention(q, all_keys, all_values, distance, seconds, tables, block, layer)
            close(out[block, first : first + count], expected, CLOSE[dtype])
            first += count
        assert (out[block, first:] == 7).all()  # rows of nobody are nobody's business


@pytest.mark.parametrize(("kind", "dtype"), STORAGES, ids=[kind.value for kind, _ in STORAGES])
@pytest.mark.parametrize("weighting", Weighting, ids=lambda w: w.value)
@settings(max_examples=2, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(users=USERS, sizes=SIZES, biased=st.booleans(), data=st.data())
def test_new_events_see_what_came_before_and_themselves(
    kind: PageType, dtype: torch.dtype, weighting: Weighting, users: list[tuple[int, int]], sizes: Sizes, biased: bool,
    data: st.DataObject,
) -> None:  # fmt: skip
    torch.manual_seed(data.draw(st.integers(0, 100)))
    whole = torch.tensor([user[: sizes.blocks] for user in users], dtype=torch.int32)
    share = data.draw(st.sampled_from([0.0, 0.4, 1.0]))
    known = (whole * share).int()
    new = whole - known
    states, tables = states_of(sizes, whole, kind), tables_of(sizes, weighting, biased)
    capacity, layer = int(new.sum(0).max()) + 2, sizes.layers - 1
    qkv = torch.randn(sizes.blocks, capacity, 3 * sizes.width).to(dtype)
    moments = torch.randint(10**6, 2 * 10**6, (sizes.blocks, capacity), dtype=torch.int32)
    rows = HistoryRows(padded([tiles_over(new[:, n].tolist()) for n in range(sizes.blocks)]), known, moments, BLOCK)
    fresh = torch.full((sizes.blocks, sizes.layers, 2, capacity, sizes.width), 7.0, dtype=dtype)
    before = states.keys_values.clone()
    store_rows(states, fresh, qkv, rows, layer)
    out = torch.full((sizes.blocks, capacity, sizes.width), 7.0, dtype=dtype)
    attend_history(out, qkv, rows, states, tables, layer)
    if sizes.layers > 1:
        assert (states.keys_values[:, 0].float() == before[:, 0].float()).all()  # other layers stay as they are
    for block in range(sizes.blocks):
        first = 0
        for user in range(len(users)):
            count, start, length = int(new[user, block]), int(known[user, block]), int(whole[user, block])
            part = slice(first, first + count)
            keys, values, then = rows_in(states, user, block, layer, length)
            q, k, v = qkv[block, part].chunk(3, -1)
            assert (fresh[block, layer, :, part] == torch.stack([k, v])).all()
            bound = 0.07 if kind is PageType.FP8 else 1e-6  # e4m3 has 3 bits behind the point
            assert (then[start:] == moments[block, part]).all()
            close(keys[start:], k.double(), bound)
            close(values[start:], v.double(), bound)
            index = torch.arange(length)
            distance = (start + torch.arange(count))[:, None] - index
            expected = attention(
                q, keys, values, distance, moments[block, part][:, None] - then, tables, block, layer
            )  # fmt: skip
            close(out[block, part], expected, CLOSE[dtype])
            first += count
        assert (out[block, first:] == 7).all()
        assert (fresh[block, layer, :, first:] == 7).all()
