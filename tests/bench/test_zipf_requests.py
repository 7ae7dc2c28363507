"""Requests by a Zipf law: none twice in a request, the law among those that are left, always the same sequence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd.bench.feature_suite.zipf_requests import BLOCK, ZipfRequests, distinct_ranks, zipf_cumulative
from rankd.bench.flops import ModelSizes
from rankd.bench.wire_forms import Form, encode_request
from rankd.bench.workload import Buckets, Fixed, Users, Workload
from rankd.errors import ConfigError

WORKLOAD = Workload(
    name="tiny",
    use="tests",
    model=ModelSizes(blocks=2, layers=1, width=8),
    history=Fixed(8),
    candidates=Fixed(8),
    users=Users(count=5, zipf_exponent=1.0),
    buckets=Buckets((4,), (8,)),
)
USERS = [f"u{number}" for number in range(5)]
ITEMS = [f"i{number}" for number in range(50)]


def requests(candidates: int = 8) -> ZipfRequests:
    return ZipfRequests(WORKLOAD, USERS, ITEMS, candidates, "m")


@settings(max_examples=30)
@given(items=st.integers(1, 40), rows=st.integers(1, 5), data=st.data())
def test_none_comes_twice(items: int, rows: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, items))
    ranks = distinct_ranks(np.random.default_rng(0), zipf_cumulative(items, 1.0), rows, count)
    assert ranks.shape == (rows, count)
    assert ranks.min() >= 0
    assert ranks.max() < items
    assert all(len(set(row)) == count for row in ranks.tolist())


def test_each_next_one_follows_the_law_among_those_left() -> None:
    ranks = distinct_ranks(np.random.default_rng(1), zipf_cumulative(4, 1.0), 40_000, 2)
    weights = 1 / np.arange(1, 5)
    first = np.bincount(ranks[:, 0], minlength=4) / len(ranks)
    assert first == pytest.approx(weights / weights.sum(), abs=0.01)
    after_zero = np.bincount(ranks[ranks[:, 0] == 0][:, 1], minlength=4)
    assert after_zero / after_zero.sum() == pytest.approx([0.0, *(weights[1:] / weights[1:].sum())], abs=0.015)


def test_any_stretch_of_one_sequence() -> None:
    one, other = requests(), requests()
    whole = one.encoded(0, 3 * BLOCK)
    assert other.encoded(BLOCK - 2, BLOCK + 5) == whole[BLOCK - 2 : 2 * BLOCK + 3]
    assert encode_request(Form.BINARY, other.request(BLOCK + 3)) == whole[BLOCK + 3]
    assert len(set(whole)) > 2 * BLOCK
    assert requests(7).encoded(0, 1) != whole[:1]


def test_popular_items_are_asked_for_most() -> None:
    made = requests()
    top = {ITEMS[place] for place in made.popular_items(5).tolist()}
    asked = [item for number in range(BLOCK) for item in made.request(number).candidates]
    share = sum(item in top for item in asked) / len(asked)
    assert share == pytest.approx(made.share_of_popular(5, BLOCK))
    assert share > 0.3
    assert sorted(made.popular_items(50).tolist()) == list(range(50))
    assert len(set(made.drawn_items(20, 1).tolist())) == 20


def test_more_candidates_than_items_are_refused() -> None:
    with pytest.raises(ConfigError, match="51 candidates of 50 items"):
        requests(51)
