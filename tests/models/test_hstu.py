"""HSTU against its paper's equations written out in loops, token by token, head by head, pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankd.errors import ConfigError
from rankd.models.blocks import Block
from rankd.models.hstu import HstuLayer
from rankd.models.layer_shapes import HstuForm
from rankd.models.protocol import create_model
from tests.features.sample_schema import make_schema

WIDTH, HEADS, LONGEST = 6, 2, 9
EACH = WIDTH // HEADS


def block_of(form: HstuForm, layers: int, seed: int = 0) -> Block:
    torch.manual_seed(seed)
    block = Block((HstuLayer(WIDTH, HEADS, LONGEST, form, 0.0) for _ in range(layers)), layers, WIDTH)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block.double().eval()


def swish(x: float) -> float:
    return x / (1.0 + math.exp(-x))


def normalised(x: list[float], norm: nn.LayerNorm) -> list[float]:
    mean = sum(x) / len(x)
    variance = sum((one - mean) ** 2 for one in x) / len(x)
    scaled = [(one - mean) / math.sqrt(variance + 1e-6) for one in x]
    return [a * w + b for a, w, b in zip(scaled, norm.weight.tolist(), norm.bias.tolist(), strict=True)]


def through(linear: nn.Linear, x: list[float]) -> list[float]:
    rows = linear.weight.tolist()
    return [
        sum(w * one for w, one in zip(row, x, strict=True)) + b
        for row, b in zip(rows, linear.bias.tolist(), strict=True)
    ]


def bucket(seconds: float) -> int:
    return min(int(2 * math.log2(1 + (max(seconds, 0) + 0.5) / 60)), 47)


def by_the_paper(layer: HstuLayer, tokens: list[list[float]], times: list[int]) -> list[list[float]]:
    """f1: U, Q, K, V; the pointwise attention with its bias; f2 of what the gates let through."""
    u: list[list[float]] = []
    q, k, v = u.copy(), u.copy(), u.copy()
    for token in tokens:
        projected = through(layer.uqkv, normalised(token, layer.norm))
        parts = [projected[n * WIDTH : (n + 1) * WIDTH] for n in range(4)]
        if layer.form is HstuForm.PAPER:
            parts = [[swish(one) for one in part] for part in parts]
        else:
            parts[0] = [swish(one) for one in parts[0]]
        for kept, part in zip((u, q, k, v), parts, strict=True):
            kept.append(part)
    position, time = layer.bias.position.tolist(), layer.bias.time.tolist()
    alpha = 1.0 if layer.form is HstuForm.PAPER else 1 / math.sqrt(EACH)
    made = []
    for i, token in enumerate(tokens):
        attended = [0.0] * WIDTH
        for h in range(HEADS):
            own = range(h * EACH, (h + 1) * EACH)
            for j in range(i + 1):
                bias = position[i - j][h] + time[bucket(times[i] - times[j])][h]
                share = swish(alpha * sum(q[i][d] * k[j][d] for d in own) + bias) / LONGEST
                for d in own:
                    attended[d] += share * v[j][d]
        gated = [a * b for a, b in zip(u[i], normalised(attended, layer.attended_norm), strict=True)]
        read = gated if layer.form is HstuForm.PAPER else [*u[i], *attended, *gated]
        made.append([a + b for a, b in zip(token, through(layer.out, read), strict=True)])
    return made


def drawn(tokens: int, seed: int) -> tuple[Tensor, list[int]]:
    torch.manual_seed(seed)
    times = sorted(torch.randint(0, 10**6, (tokens,)).tolist())
    return torch.randn(tokens, WIDTH, dtype=torch.float64), times


@pytest.mark.parametrize("form", HstuForm)
@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(1, LONGEST), pads=st.integers(0, 3), seed=st.integers(0, 1000))
def test_a_history_passes_the_layers_as_the_paper_says(form: HstuForm, tokens: int, pads: int, seed: int) -> None:
    """The state of the second layer is made of all that the first one computes."""
    block, (x, times) = block_of(form, 2, seed), drawn(tokens, seed)
    first, second = block.get_submodule("stack.0"), block.get_submodule("stack.1")
    assert isinstance(first, HstuLayer)
    assert isinstance(second, HstuLayer)
    expected = by_the_paper(first, x.tolist(), times)
    padded = nn.functional.pad(x, (0, 0, 0, pads))[None]
    with torch.inference_mode():
        state = block.encode(padded, torch.tensor([times + [0] * pads]))
        for place, values in enumerate((x, torch.tensor(expected, dtype=torch.float64))):
            layer = (first, second)[place]
            keys, kept = layer.keys_values(layer.normed(values))
            torch.testing.assert_close(state[0, place, 0, :tokens], keys, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(state[0, place, 1, :tokens], kept, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", HstuForm)
@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(0, LONGEST), pads=st.integers(0, 3), seed=st.integers(0, 1000))
def test_a_candidate_is_the_token_after_the_history(form: HstuForm, tokens: int, pads: int, seed: int) -> None:
    block, (x, times) = block_of(form, 2, seed), drawn(tokens, seed)
    layers = [block.get_submodule(f"stack.{n}") for n in range(2)]
    items, now = torch.randn(1, 3, WIDTH, dtype=torch.float64), 10**6 + 500
    room = max(tokens + pads, 1)
    padded = nn.functional.pad(x, (0, 0, 0, room - tokens))[None]
    moments = torch.tensor([times + [0] * (room - tokens)])
    with torch.inference_mode():
        given_ = block.candidates(items, block.encode(padded, moments), now - moments, torch.tensor([tokens]))
        for number in range(items.shape[1]):
            sequence = [*x.tolist(), items[0, number].tolist()]
            for layer in layers:
                assert isinstance(layer, HstuLayer)
                sequence = by_the_paper(layer, sequence, [*times, now])
            expected = torch.tensor(sequence[-1], dtype=torch.float64)
            torch.testing.assert_close(given_[0, number], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "papr"}, "form is 'papr'; it has to be one of paper, dlrm-v3"),
        ({"width": 10, "heads": 4}, "width 10 has to be a multiple of heads 4"),
        ({"layers": 0}, "at least one head and layer"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model("hstu", make_schema(), options)


def test_the_sizes_are_those_of_mlperf() -> None:
    """4 heads of 128: from 512 to 4 x 512, and from U, a and U * norm(a) to 512."""
    sizes = {name: tuple(one.shape) for name, one in HstuLayer(512, 4, 16, HstuForm.DLRM_V3, 0.1).named_parameters()}
    assert (sizes["uqkv.weight"], sizes["out.weight"]) == ((4 * 4 * 128, 512), (512, 3 * 512))
