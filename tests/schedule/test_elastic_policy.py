"""Which versions may answer, under a made-up clock: lighter ones when there is too much, the full one when there is
not, and no going back and forth, whatever comes."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.errors import ConfigError
from rankd.schedule.elastic_config import ElasticConfig, check_elastic
from rankd.schedule.elastic_policy import LoadMeter, Seen, Standing, look

CONFIG = ElasticConfig(("a", "b"), to_lighter_ms=100.0, to_full_ms=50.0, dwell_seconds=1.0, calm_seconds=5.0)
HIGH, LOW = (1.5, 0.9, 0.5), (0.3, 0.2, 0.1)


def after(standing: Standing, *seen: Seen) -> list[int]:
    """The levels after each look."""
    levels = []
    for one in seen:
        standing = look(standing, one, CONFIG)
        levels.append(standing.level)
    return levels


def test_lighter_variants_come_one_at_a_time_while_too_much_waits() -> None:
    crowd = [Seen(now, 150.0, HIGH) for now in (0.0, 0.5, 0.99, 1.0, 1.5, 2.0, 9.0)]
    assert after(Standing(), *crowd) == [1, 1, 1, 2, 2, 2, 2]
    assert after(Standing(), Seen(0.0, 100.0, HIGH)) == [0]  # as much as is allowed


def test_a_refusal_counts_where_the_load_is_high() -> None:
    assert after(Standing(), Seen(0.0, 10.0, LOW, refused=True)) == [0]  # that one has too little time, nothing else
    assert after(Standing(), Seen(0.0, 10.0, HIGH, refused=True)) == [1]
    lighter = Standing(1, 0.0, 0.0)
    assert after(lighter, Seen(2.0, 10.0, (1.5, 0.7, 0.5), refused=True)) == [1]  # the variant itself has time
    assert after(lighter, Seen(2.0, 10.0, HIGH, refused=True)) == [2]


def test_the_full_version_comes_back_when_it_has_been_calm_for_long_enough() -> None:
    busy = Standing(1, 0.0, 0.0)
    assert after(busy, *(Seen(now, 0.0, LOW) for now in (1.0, 4.9, 5.0))) == [1, 1, 0]
    waves = [Seen(1.0, 0.0, LOW), Seen(3.0, 60.0, LOW), Seen(7.9, 0.0, LOW), Seen(8.0, 50.0, LOW)]
    assert after(busy, *waves) == [1, 1, 1, 0]  # what waited at 3 s begins it anew


def test_a_short_queue_is_no_reason_to_go_back_to_a_version_that_could_not_do_it() -> None:
    steady = [Seen(float(now), 0.0, (1.2, 0.6, 0.3)) for now in range(1, 100)]
    assert set(after(Standing(1, 0.0, 0.0), *steady)) == {1}
    assert after(Standing(2, 0.0, 0.0), *steady)[-1] == 1  # the fullest that can
    assert after(Standing(2, 0.0, 0.0), *(Seen(float(now), 0.0, LOW) for now in range(1, 100)))[-1] == 0


def test_after_a_silence_the_first_request_has_the_full_version() -> None:
    assert after(Standing(2, 0.0, 0.0), Seen(60.0, 0.0, (0.0, 0.0, 0.0))) == [0]


SEEN = st.tuples(
    st.floats(0.0, 3.0),  # seconds since the one before
    st.floats(0.0, 300.0),
    st.tuples(st.floats(0.0, 3.0), st.floats(0.0, 3.0), st.floats(0.0, 3.0)),
    st.booleans(),
)


def walk(steps: list[tuple[float, float, tuple[float, ...], bool]]) -> list[tuple[Seen, Standing]]:
    standing, now, walked = Standing(), 0.0, []
    for gap, waiting_ms, loads, refused in steps:
        now += gap
        seen = Seen(now, waiting_ms, loads, refused)
        standing = look(standing, seen, CONFIG)
        walked.append((seen, standing))
    return walked


@given(st.lists(SEEN, max_size=120))
def test_there_is_no_flapping_under_any_load(steps: list[tuple[float, float, tuple[float, ...], bool]]) -> None:
    walked = walk(steps)
    standings = [Standing(), *(standing for _, standing in walked)]
    changes, ways_back = [], []
    for (before, standing), (seen, _) in zip(itertools.pairwise(standings), walked, strict=True):
        assert 0 <= standing.level <= 2
        if standing.level == before.level:
            continue
        changes.append(seen.now)
        if standing.level > before.level:
            assert standing.level == before.level + 1
            assert seen.waiting_ms > CONFIG.to_lighter_ms or (seen.refused and seen.loads[before.level] > 0.8)
        else:
            ways_back.append(seen.now)
            assert seen.waiting_ms <= CONFIG.to_full_ms
            assert seen.loads[standing.level] <= CONFIG.to_full_load
    assert all(later - earlier >= CONFIG.dwell_seconds for earlier, later in itertools.pairwise(changes))
    assert all(later - earlier >= CONFIG.calm_seconds for earlier, later in itertools.pairwise(ways_back))


@given(st.lists(SEEN, max_size=60))
def test_it_is_always_back_when_the_load_is_gone(steps: list[tuple[float, float, tuple[float, ...], bool]]) -> None:
    walked = walk(steps)
    standing, now = (walked[-1][1], walked[-1][0].now) if walked else (Standing(), 0.0)
    for later in (0.0, CONFIG.calm_seconds + 0.001):
        standing = look(standing, Seen(now + later, 0.0, (0.1, 0.1, 0.1)), CONFIG)
    assert standing.level == 0


def test_the_load_is_the_share_of_the_cores_that_a_version_would_take() -> None:
    meter = LoadMeter(seconds=2.0)
    assert meter.loads(0.0, ["1", "a"], cores=2) == (0.0, 0.0)
    for number in range(4000):
        meter.came(number / 200, {"1": 12.0, "a": 5.0})  # 200 a second
    loads = meter.loads(20.0, ["1", "a"], cores=2)
    assert loads == pytest.approx((1.2, 0.5), rel=0.02)
    assert meter.loads(22.0, ["1", "a"], cores=2) == pytest.approx([load / math.e for load in loads])
    assert max(meter.loads(60.0, ["1", "a"], cores=2)) < 1e-6


def test_a_version_that_is_new_is_not_taken_for_idle() -> None:
    meter = LoadMeter(seconds=1.0)
    for number in range(1000):
        meter.came(number / 100, {"1": 10.0, "a": 5.0})
    meter.came(10.0, {"2": 10.0, "a": 5.0})
    assert meter.loads(10.0, ["2", "a"], cores=1) == pytest.approx((1.0, 0.5), rel=0.03)


def test_what_cannot_work_is_refused_in_words() -> None:
    good = ElasticConfig(("a",))
    check_elastic("films", good, 2000.0)
    bad = msgspec.structs.replace(good, to_full_ms=100.0)
    with pytest.raises(ConfigError, match=r"elastic\.films: to_full_ms is 100 and to_lighter_ms 100.*below"):
        check_elastic("films", bad, 2000.0)
    with pytest.raises(ConfigError, match=r"to_lighter_ms is 100, .*schedule\.max_waiting_ms = 80 wait"):
        check_elastic("films", good, 80.0)
    with pytest.raises(ConfigError, match="names 'a' twice"):
        check_elastic("films", ElasticConfig(("a", "b", "a")), 2000.0)
