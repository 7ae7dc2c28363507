"""Work of uneven models: that of even ones is what `bench.flops` counts, and smaller models have less of it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.bench.flops import ModelSizes, climber_flops
from rankd.compress.anatomy import Anatomy
from rankd.compress.layer_prices import Yardstick
from rankd.compress.model_work import encode_work, score_work
from rankd.models.layer_shapes import LayerShape, even_fusion, even_layers

SIZES = st.builds(
    ModelSizes,
    blocks=st.integers(1, 4),
    layers=st.integers(1, 4),
    width=st.sampled_from([8, 32]),
    heads=st.sampled_from([1, 4]),
    ffn_ratio=st.integers(1, 4),
    hidden=st.integers(1, 99),
    tasks=st.integers(1, 3),
)


@given(SIZES, st.integers(1, 99), st.integers(1, 99))
def test_an_even_climber_has_the_flops_of_the_benchmarks(sizes: ModelSizes, tokens: int, candidates: int) -> None:
    stack = even_layers(sizes.width, sizes.heads, sizes.layers, sizes.ffn_ratio)
    fusion = even_fusion(sizes.width, sizes.heads, sizes.blocks)
    model = Anatomy(sizes.width, (stack,) * sizes.blocks, sizes.tasks, fusion, sizes.hidden)
    expected = climber_flops(sizes, tokens, candidates)
    scored, encoded = score_work(model, tokens, candidates).flops, encode_work(model, tokens).flops
    assert scored == pytest.approx(expected.candidates)
    assert scored + encoded == pytest.approx(expected.needed)


LAYER = LayerShape(heads=2, head_width=8, ffn=32)


def test_shared_layers_cost_as_often_as_they_are_passed() -> None:
    fusion = even_fusion(16, 2, 1)
    shared = Anatomy(16, ((LAYER,),), 1, fusion, hidden=4, repeats=3)
    apart = Anatomy(16, ((LAYER, LAYER, LAYER),), 1, fusion, hidden=4)
    assert score_work(shared, 5, 7) == score_work(apart, 5, 7)
    assert encode_work(shared, 5) == encode_work(apart, 5)


def test_low_ranks_cost_their_two_products() -> None:
    low = msgspec.structs.replace(LAYER, up_rank=4, down_rank=2, qkv_rank=3, out_rank=1)
    made = score_work(Anatomy(16, ((low,),), 1, even_fusion(16, 2, 1), hidden=4), tokens=0, candidates=1)
    assert made.ffn == 2 * (4 * (16 + 32) + 2 * (32 + 16))
    assert made.projections == 2 * (3 * (16 + 48) + 1 * (16 + 16))


def test_a_sasrec_scores_by_a_product_with_the_user() -> None:
    model = Anatomy(16, ((LAYER,),), num_tasks=2)
    assert score_work(model, 9, 5).flops == 2 * 16 * 16 * 2 + 5 * 4 * 16 * 2
    each = 2 * 16 * 48 + 2 * 16 * 16 + 4 * 16 * 32
    assert encode_work(model, 9).flops == 9 * each + 4 * 16 * 45


def test_a_yardstick_counts_the_share_of_requests_that_encode() -> None:
    model = Anatomy(16, ((LAYER,),), 1, even_fusion(16, 2, 1), hidden=4)
    half, none, always = (Yardstick(9, 5, share).flops(model) for share in (0.5, 0.0, 1.0))
    assert half == pytest.approx((none + always) / 2)
    assert none == score_work(model, 9, 5).flops
