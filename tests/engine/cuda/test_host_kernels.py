"""Kernels that read and write the host's memory by its addresses: pages as `_place` puts them, rows to their homes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankd.engine.cuda.kernels.triton_host_states import Homes, deliver_rows, fetch_pages
from rankd.engine.cuda.kernels.triton_state_rows import ArrivedPages, place_pages
from rankd.engine.cuda.paged_states import PageType
from tests.engine.cuda.plain_attention import ON_GPU, PAGE, Sizes, states_of


@pytest.mark.parametrize("kind", PageType, ids=lambda kind: kind.value)
@pytest.mark.parametrize("head", [8, 12])  # of 12 a piece does not begin at a multiple of 16 bytes
def test_pages_are_fetched_as_they_are_placed(kind: PageType, head: int) -> None:
    sizes, room, tokens = Sizes(1, 2, 2, head), 3 * PAGE + 5, [PAGE, PAGE, 7]
    dtype = torch.float32 if kind is PageType.FP32 else torch.bfloat16
    host = pinned_tensor(torch.randn(sizes.layers, 2, room, sizes.width).to(dtype))
    moments = pinned_tensor(torch.randint(0, 100, (room,), dtype=torch.int32))
    fetched, placed = (states_of(sizes, torch.tensor([[4 * PAGE]]), kind) for _ in range(2))
    for copy in (fetched.keys_values, fetched.scales, fetched.times, placed.keys_values, placed.scales, placed.times):
        copy.zero_()
    places = [3, 0, 2]
    rows = [
        [host[0, 0, n * PAGE].data_ptr(), moments[n * PAGE].data_ptr(), host.stride(1) * dtype.itemsize, size, place]
        for n, (size, place) in enumerate(zip(tokens, places, strict=True))
    ] + [[0] * 5]
    fetch_pages(fetched, torch.tensor(rows), torch.tensor([3], dtype=torch.int32), sizes.heads, dtype)
    came = torch.zeros(3, sizes.layers, 2, PAGE, sizes.width, dtype=dtype)
    times = torch.zeros(3, PAGE, dtype=torch.int32)
    for n, size in enumerate(tokens):
        came[n, :, :, :size] = host[:, :, n * PAGE : n * PAGE + size]
        times[n, :size] = moments[n * PAGE : n * PAGE + size]
    three = torch.tensor([3], dtype=torch.int32)
    place_pages(placed, ArrivedPages(three, torch.tensor(places, dtype=torch.int32), times, came), sizes.heads)
    assert (fetched.keys_values.float() == placed.keys_values.float()).all()
    assert (fetched.times == placed.times).all()
    if kind is PageType.FP8:
        for n, place in enumerate(places):
            assert (fetched.scales[place, :, :, : tokens[n]] == placed.scales[place, :, :, : tokens[n]]).all()
    assert not fetched.times[1].any()
    assert not fetched.keys_values[1].float().any()


@pytest.mark.parametrize("width", [24, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rows_are_delivered_to_those_who_have_a_home(dtype: torch.dtype, width: int) -> None:
    fresh = torch.randn(2, 3, 2, 40, width).to(dtype)
    first = [[0, 0, 0, 16], [0, 16, 16, 3], [1, 19, 0, 16], [2, 35, 0, 5]]
    second = [[0, 0, 0, 1], [1, 1, 0, 2], [-1] * 4, [-1] * 4]
    tiles = torch.tensor([first, second], dtype=torch.int32)
    hosts = [pinned_tensor(torch.full((2, 3, 2, room, width), 7.0, dtype=dtype)) for room in (19, 25, 9)]
    homes = torch.tensor([[host[block].data_ptr() for block in range(2)] for host in hosts])
    homes[1] = 0
    apart = torch.tensor([host.stride(2) * dtype.itemsize for host in hosts], dtype=torch.int32)
    deliver_rows(fresh, Homes(homes, apart, tiles))
    if ON_GPU:
        torch.cuda.synchronize()
    expected = [torch.full_like(host, 7.0) for host in hosts]
    expected[0][0, :, :, :19], expected[0][1, :, :, :1] = fresh[0, :, :, :19], fresh[1, :, :, :1]
    expected[2][0, :, :, :5] = fresh[0, :, :, 35:40]
    for host, wanted in zip(hosts, expected, strict=True):
        assert (host == wanted).all()


def pinned_tensor(tensor: Tensor) -> Tensor:
    """On a GPU in page-locked memory of the host."""
    return tensor.cpu().pin_memory() if ON_GPU else tensor
