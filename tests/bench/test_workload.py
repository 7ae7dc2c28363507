"""Workload files, the laws they state, and the requests drawn from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rankd.bench.flops import ModelKind
from rankd.bench.workload import (
    FOLDER,
    Choice,
    Fixed,
    Law,
    LogNormal,
    Mixture,
    Share,
    Users,
    draw,
    draw_requests,
    largest,
    load_workload,
    read_workload,
    returning_share,
    workload_names,
    zipf_ranks,
)
from rankd.errors import ConfigError
from rankd.models.layer_shapes import HstuForm

DRAWS = 100_000
SHARES = Mixture((Share(0.8, 16, 64), Share(0.2, 512, 1024)))


def random() -> np.random.Generator:
    return np.random.default_rng(5)


def test_packaged_workloads() -> None:
    assert workload_names() == ["base", "hstu", "hstu-long", "long", "mixed", "skewed", "small", "two-kinds"]
    for name in workload_names():
        assert load_workload(name).name == name


@pytest.mark.parametrize(
    ("name", "width", "blocks", "layers", "tokens", "candidates", "gflop"),
    [("base", 256, 2, 3, 256, 128, 4), ("long", 256, 2, 4, 512, 512, 16), ("small", 64, 2, 2, 50, 20, 0.03)],
)
def test_sizes_of_the_design(
    name: str, width: int, blocks: int, layers: int, tokens: int, candidates: int, gflop: float
) -> None:
    workload = load_workload(name)
    model = workload.model
    assert (model.width, model.blocks, model.layers, model.heads) == (width, blocks, layers, 4)
    assert workload.block_tokens == tokens
    assert workload.history == Fixed(blocks * tokens)
    assert workload.candidates == Fixed(candidates)
    assert workload.flops().useful / 1e9 == pytest.approx(gflop, rel=0.08)


def test_hstu_has_the_sizes_of_mlperf() -> None:
    """dlrm-v3: 5 layers, 4 heads, 128 for queries, keys, values and gates of each, 2,048 candidates."""
    workload = load_workload("hstu")
    model = workload.model
    assert (model.kind, model.form) == (ModelKind.HSTU, HstuForm.DLRM_V3)
    assert (model.blocks, model.layers, model.heads, model.width // model.heads) == (1, 5, 4, 128)
    assert workload.history == workload.candidates == Fixed(2048)
    tokens, widths, pairs = 2048 + 2048, 4 + 3, 2048 * 2049 // 2 + 2048 * 2049
    head = 2048 * 2 * (512 * 512 + 512)
    assert workload.flops().useful == pytest.approx(5 * (2 * tokens * widths * 512**2 + pairs * 4 * 512) + head)


@pytest.mark.parametrize("name", ["mixed", "skewed"])
def test_mixed_and_skewed_have_the_model_of_base(name: str) -> None:
    workload, base = load_workload(name), load_workload("base")
    assert workload.model == base.model
    assert workload.block_tokens == base.block_tokens
    assert isinstance(workload.history, LogNormal)
    assert (workload.history.minimum, workload.history.maximum) == (64, 512)


def test_mixed_candidates_are_those_of_mlperf() -> None:
    law = load_workload("mixed").candidates
    assert isinstance(law, Choice)
    assert np.mean(law.values) == 270
    assert (min(law.values), max(law.values)) == (100, 700)


def test_flops_of_a_mixture_lie_between_its_ends(tmp_path: Path) -> None:
    text = (FOLDER / "base.toml").read_text()
    mixture = text.replace("candidates = [128]", "candidates = [256]").replace(
        '[candidates]\nlaw = "fixed"\nvalue = 128', '[candidates]\nlaw = "choice"\nvalues = [64, 192]'
    )
    (tmp_path / "mixture.toml").write_text(mixture)
    # The useful operations are linear in C, so those of 64 and 192 evenly are those of 128.
    mixed = read_workload(tmp_path / "mixture.toml").flops()
    assert mixed.useful == pytest.approx(load_workload("base").flops().useful, rel=0.01)
    assert mixed.dense > load_workload("base").flops().dense  # and the dense ones are convex


def test_unknown_workload_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown workload 'smal'.*Did you mean 'small'"):
        load_workload("smal")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("width = 64", "widht = 64", r"unknown key 'model\.widht'.*Did you mean 'width'"),
        ('law = "fixed"', 'law = "fixd"', "Invalid value 'fixd'"),
        ("value = 20", "value = 0", r"candidates\.value"),
        ("value = 20", "valeu = 20", "valeu"),
        ("value = 20", "value = 500", "up to 500 candidates are drawn, and the largest bucket holds 200"),
        ("[16, 50]", "[50, 16]", r"buckets\.history is \[50, 16\]; it has to ascend"),
        ("heads = 4", "kind = 'hsut'", r"Invalid enum value 'hsut'"),
        ("heads = 4", "heads = 5", "width 64 is not a multiple of heads 5"),
        (
            'law = "fixed"\nvalue = 100',
            'law = "log-normal"\nmedian=3\nsigma=1\nminimum=9\nmaximum=8',
            "9 above maximum 8",
        ),
    ],
)
def test_bad_workload_file_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (FOLDER / "small.toml").read_text()
    assert old in text
    (tmp_path / "bad.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        read_workload(tmp_path / "bad.toml")


@pytest.mark.parametrize("law", [Fixed(7), LogNormal(180, 0.7, 64, 512), Choice((1, 2, 2)), SHARES])
def test_draws_are_seeded_whole_and_in_range(law: Law) -> None:
    drawn = draw(law, random(), 1000)
    assert np.array_equal(drawn, draw(law, random(), 1000))
    assert drawn.dtype == np.int64
    assert drawn.min() >= 1
    assert drawn.max() <= largest(law)
    assert draw(law, random(), 0).shape == (0,)


def test_draws_follow_their_laws() -> None:
    lengths = draw(LogNormal(180, 0.7, 64, 512), random(), DRAWS)
    assert np.median(lengths) == pytest.approx(180, rel=0.02)
    inside = np.log(lengths[(lengths > 64) & (lengths < 512)] / 180) / 0.7
    assert np.mean(np.abs(inside) < 0.5) * len(inside) / DRAWS == pytest.approx(0.383, abs=0.01)  # of a normal law
    assert np.mean(lengths == 512) == pytest.approx(0.068, abs=0.005)  # P(Z > log(512 / 180) / 0.7)
    counts = draw(SHARES, random(), DRAWS)
    assert np.mean(counts <= 64) == pytest.approx(0.8, abs=0.01)
    assert counts[counts <= 64].mean() == pytest.approx(40, rel=0.01)
    assert counts[counts > 64].min() == 512
    assert np.mean(draw(Choice((100, 200, 200)), random(), DRAWS) == 200) == pytest.approx(2 / 3, abs=0.01)


def test_returning_users_follow_zipf() -> None:
    ranks = zipf_ranks(Users(count=100, zipf_exponent=1.0), random(), DRAWS)
    expected = 1 / np.arange(1, 101) / np.sum(1 / np.arange(1, 101))
    assert np.bincount(ranks, minlength=100) / DRAWS == pytest.approx(expected, abs=0.005)
    even = zipf_ranks(Users(count=100, zipf_exponent=0.0), random(), DRAWS)
    assert np.bincount(even, minlength=100) / DRAWS == pytest.approx(0.01, abs=0.002)


def test_requests_are_seeded_and_of_the_workload() -> None:
    workload = load_workload("skewed")
    users, items = [f"u{n}" for n in range(50)], [f"i{n}" for n in range(1500)]
    requests = draw_requests(workload, users, items, 200, "m")
    assert requests == draw_requests(workload, users, items, 200, "m")
    assert {request.model for request in requests} == {"m"}
    for request in requests:
        size = len(request.candidates)
        assert 16 <= size <= 64 or 512 <= size <= 1024
        assert len(set(request.candidates)) == size
        assert set(request.candidates) <= set(items)
        assert request.user_id in users
    assert len({request.request_id for request in requests}) == 200
    assert requests[:20] != draw_requests(workload, users, items, 200, "m")[20:40]


def test_requests_need_items_and_users() -> None:
    workload = load_workload("small")
    with pytest.raises(ConfigError, match="has 19 items"):
        draw_requests(workload, ["u"], ["i"] * 19, 1)
    with pytest.raises(ConfigError, match="0 users"):
        draw_requests(workload, [], ["i"] * 20, 1)


def test_returning_share() -> None:
    items = [f"i{n}" for n in range(20)]
    requests = draw_requests(load_workload("small"), ["only"], items, 4)
    assert returning_share(requests) == 0.75
