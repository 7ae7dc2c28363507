"""Kernels over rows in Triton's interpreter against plain torch: projections, feed-forward, fusion, embeddings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu

from rankd.engine.cuda.kernels.fastest_way import FastestWay
from rankd.engine.cuda.kernels.triton_block_fusion import attend_blocks
from rankd.engine.cuda.kernels.triton_feed_forward import FeedForward, feed_forward_fused, feed_forward_in_two
from rankd.engine.cuda.kernels.triton_gated_output import GatedOutput, finish_gated
from rankd.engine.cuda.kernels.triton_pieces import LOG2_E
from rankd.engine.cuda.kernels.triton_pooled_gather import Pooling, PoolingRows, pool
from rankd.engine.cuda.kernels.triton_projection import Linear, folded, project, project_by_library, project_fused
from tests.engine.cuda.test_attention_kernels import CLOSE, close

ACTIVATIONS = {"": lambda x: x, "gelu": gelu, "silu": silu, "relu": torch.relu}
TYPES = pytest.mark.parametrize("dtype", CLOSE, ids=["fp32", "bf16"])


def counted(*counts: int) -> Tensor:
    return torch.tensor(counts, dtype=torch.int32)


def check(out: Tensor, expected: Tensor, counts: Tensor, bound: float) -> None:
    """The first counts[g] rows are right and the others untouched (they were 7)."""
    for group, count in enumerate(counts.tolist()):
        close(out[group, :count], expected[group, :count], bound)
        assert (out[group, count:] == 7).all()


@pytest.mark.parametrize("way", [project_fused, project_by_library])
@TYPES
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "normed", "activation", "after", "shared"),
    [
        (17, 33, 5, True, "gelu", "", False),
        (16, 64, 40, False, "silu", "residual", False),
        (3, 7, 33, True, "relu", "gate", True),
        (1, 1, 1, False, "", "", False),
    ],
)
def test_projects(
    dtype: torch.dtype, rows: int, inputs: int, outputs: int, normed: bool, activation: str, after: str, shared: bool,
    way: Callable[..., None],
) -> None:  # fmt: skip
    torch.manual_seed(rows)
    counts = counted(rows, 0, rows - 1)
    x = torch.randn(3, rows, inputs) + 3.0
    if not normed:
        x = x.to(dtype)
    weight = (torch.randn(1 if shared else 3, outputs, inputs) / inputs**0.5).to(dtype)
    bias, other = torch.randn(weight.shape[:2]), torch.randn(3, rows, outputs)
    out = torch.full((3, rows, outputs), 7.0)
    sides = {"residual": other if after == "residual" else None, "gated": other if after == "gate" else None}
    way(out, x, Linear(weight, bias, normed, activation), counts, **sides)
    read = x.double()
    if normed:
        read = layer_norm(read, (inputs,)).to(dtype).double()
    made = ACTIVATIONS[activation](read @ weight.double().transpose(1, 2) + bias.double()[:, None])
    expected = {"": made, "residual": other + made, "gate": other * torch.sigmoid(made)}[after]
    check(out, expected, counts, CLOSE[dtype])


@pytest.mark.parametrize("way", [project_fused, project_by_library])
def test_a_projection_may_write_into_its_residual_and_anywhere(way: Callable[..., None]) -> None:
    x, weight = torch.randn(2, 5, 16), torch.randn(2, 8, 16)
    channels = torch.randn(5, 16)  # two groups side by side
    out = channels.view(5, 2, 8).transpose(0, 1)
    expected = (out + x @ weight.transpose(1, 2)).double()
    way(out, x, Linear(weight, torch.zeros(2, 8)), counted(5, 5), residual=out)
    close(channels.view(5, 2, 8).transpose(0, 1), expected, 1e-5)


def test_a_folded_norm_is_a_norm() -> None:
    weight, bias, norm_weight, norm_bias = torch.randn(6, 9), torch.randn(6), torch.randn(9), torch.randn(9)
    x = torch.randn(1, 4, 9)
    out = torch.empty(1, 4, 6)
    folds = folded(weight, bias, norm_weight, norm_bias)
    project(out, x, Linear(folds[0][None], folds[1][None], normed=True), counted(4))
    close(out, (layer_norm(x, (9,), norm_weight, norm_bias) @ weight.t() + bias).double(), 1e-5)


@pytest.mark.parametrize("way", [project_fused, project_by_library])
def test_an_activation_may_begin_behind_some_outputs(way: Callable[..., None]) -> None:
    x, weight, out = torch.randn(1, 3, 16), torch.randn(1, 40, 16), torch.empty(1, 3, 40)
    expected = (x @ weight.transpose(1, 2)).double()
    expected[..., 33:] = silu(expected[..., 33:])
    way(out, x, Linear(weight, torch.zeros(1, 40), activation="silu", activated_from=33), counted(3))
    close(out, expected, 1e-5)


@pytest.mark.parametrize("way", [project_fused, project_by_library])
def test_a_norm_has_the_epsilon_of_its_layer(way: Callable[..., None]) -> None:
    x, out = torch.tensor([[[1e-3, -1e-3] * 8]]), torch.empty(1, 1, 16)
    way(out, x, Linear(torch.eye(16)[None], torch.zeros(1, 16), normed=True, epsilon=1e-6), counted(1))
    close(out, layer_norm(x.double(), (16,), eps=1e-6), 1e-5)


@TYPES
@pytest.mark.parametrize(("rows", "width", "outputs", "parts"), [(17, 40, 24, 3), (33, 16, 70, 1), (1, 6, 6, 3)])
def test_lets_gates_decide(dtype: torch.dtype, rows: int, width: int, outputs: int, parts: int) -> None:
    torch.manual_seed(rows)
    counts = counted(rows, rows - 1)
    attended = (torch.randn(2, rows, width) * 1e-3 + 2e-3).to(dtype)  # divided by a length: the epsilon counts
    both = torch.randn(2, rows, 2 * width).to(dtype)
    gates = both[..., width:]
    weight = (torch.randn(2, outputs, parts * width) / (parts * width) ** 0.5).to(dtype)
    layer = GatedOutput(weight, torch.randn(2, outputs), torch.randn(2, 2, width), 1e-6)
    normed = torch.stack(
        [
            layer_norm(a.double(), (width,), n[0].double(), n[1].double(), 1e-6)
            for a, n in zip(attended, layer.norm, strict=True)
        ]
    )
    gated = (gates.double() * normed).to(dtype).double()
    read = gated if parts == 1 else torch.cat([gates.double(), attended.double(), gated], -1)
    x = torch.randn(2, rows, outputs)
    expected = x + read @ weight.double().transpose(1, 2) + layer.bias.double()[:, None]
    x[1, rows - 1 :] = 7.0
    finish_gated(x, attended, gates, layer, counts)
    check(x, expected, counts, CLOSE[dtype])


@TYPES
@pytest.mark.parametrize(
    ("rows", "width", "hidden", "gated", "way"),
    [
        (17, 24, 40, True, feed_forward_fused),
        (5, 32, 16, False, feed_forward_fused),
        (5, 32, 16, False, feed_forward_in_two),
    ],
)
def test_feeds_forward(
    dtype: torch.dtype, rows: int, width: int, hidden: int, gated: bool, way: Callable[..., None]
) -> None:
    torch.manual_seed(rows)
    counts, ups = counted(rows, rows - 1), hidden * (1 + gated)
    x = torch.randn(2, rows, width) + 3.0
    up = (torch.randn(2, ups, width) / width**0.5).to(dtype)
    down = (torch.randn(2, width, hidden) / hidden**0.5).to(dtype)
    layer = FeedForward(up, torch.randn(2, ups), down, torch.randn(2, width), "silu" if gated else "gelu", gated)
    read = layer_norm(x.double(), (width,)).to(dtype).double()
    made = read @ up.double().transpose(1, 2) + layer.up_bias.double()[:, None]
    inner = silu(made[..., :hidden]) * made[..., hidden:] if gated else gelu(made)
    inner = inner.to(dtype).double()
    expected = x + inner @ down.double().transpose(1, 2) + layer.down_bias.double()[:, None]
    x[1, rows - 1 :] = 7.0
    way(x, layer, counts)
    check(x, expected, counts, CLOSE[dtype])


@TYPES
@pytest.mark.parametrize(("blocks", "heads", "head", "rows"), [(3, 2, 12, 19), (1, 1, 16, 2)])
def test_attends_over_blocks(dtype: torch.dtype, blocks: int, heads: int, head: int, rows: int) -> None:
    torch.manual_seed(rows)
    width = heads * head
    qkv = torch.randn(blocks, rows, 3 * width).to(dtype)
    out = torch.full((blocks, rows, width), 7.0, dtype=dtype)
    attend_blocks(out, qkv, counted(rows - 1), heads, head**-0.5 * LOG2_E)
    q, k, v = (part.double().unflatten(-1, (heads, head)).permute(1, 2, 0, 3) for part in qkv.chunk(3, -1))
    expected = (torch.softmax(q @ k.transpose(-1, -2) * head**-0.5, -1) @ v).permute(2, 0, 1, 3).flatten(2)
    check(out, expected, counted(*[rows - 1] * blocks), CLOSE[dtype])


@TYPES
@pytest.mark.parametrize(("rows", "columns", "numbers", "more"), [(19, 3, 2, True), (1, 1, 0, False)])
def test_pools(dtype: torch.dtype, rows: int, columns: int, numbers: int, more: bool) -> None:
    torch.manual_seed(rows)
    width, sizes = 24, torch.randint(3, 9, (columns,), dtype=torch.int32)
    starts = (sizes.cumsum(0) - sizes).int()
    tables = torch.randn(int(sizes.sum()), width).to(dtype)
    ids = torch.randint(-2, 12, (2, rows, columns), dtype=torch.int32)  # some of them outside
    weight = torch.randn(numbers, width) if numbers else None
    values = torch.randn(2, rows, numbers) if numbers else None
    added, users = (torch.randn(2, rows, width), torch.randn(3, width)) if more else (None, None)
    user_of = torch.randint(0, 3, (rows,), dtype=torch.int32) if more else None
    norm = torch.randn(2, width) if more else None
    counts = counted(rows, rows // 2)
    out = torch.full((2, rows, width), 7.0)
    pool(out, Pooling(tables, starts, sizes, weight, norm), PoolingRows(ids, counts, values, added, users, user_of))
    known = torch.where((ids >= 0) & (ids < sizes), ids, 0) + starts
    expected = tables.double()[known.long()].sum(2)
    if weight is not None and values is not None:
        expected = expected + values.double() @ weight.double()
    if added is not None and users is not None and user_of is not None and norm is not None:
        expected = expected + added + users[user_of.long()]
        expected = layer_norm(expected, (width,), norm[0].double(), norm[1].double())
    check(out, expected, counts, 1e-5)


def test_pools_once_for_all_blocks() -> None:
    tables, ids = torch.randn(5, 16), torch.tensor([[[1], [4]]], dtype=torch.int32)
    out = torch.empty(3, 2, 16)
    pool(out, Pooling(tables, counted(0), counted(5)), PoolingRows(ids, counted(2)))
    assert (out == tables[[1, 4]]).all()


def test_the_fastest_way_is_measured_once_for_a_shape_and_leaves_no_trace() -> None:
    took, ran = {"fused": 2.0, "library": 1.0}, []
    x = torch.zeros(2)

    def way(name: str) -> Callable[[], None]:
        def run() -> None:
            ran.append(name)
            x.add_(1)

        return run

    ways = {name: way(name) for name in took}

    def milliseconds(run: Callable[[], None]) -> float:
        run()
        return took[ran[-1]]

    choice = FastestWay("test", milliseconds)
    choice.run("large", ways, (x,))
    assert ran == ["fused", "library", "library"]
    assert (x == 1).all()  # measured on what was put back, then run once
    took["fused"] = 0.5
    choice.run("large", ways, (x,))
    assert ran[3:] == ["library"]
    choice.run("small", ways, (x,))
    assert ran[4:] == ["fused", "library", "fused"]
    FastestWay("test").run("large", ways)  # the interpreter measures nothing
    assert ran[7:] == ["fused"]
