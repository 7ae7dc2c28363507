"""A target in a line, and which trial answers it: what is asked for, what is nearest, and why."""

from __future__ import annotations

import msgspec
import pytest

from rankd.compress.compression_recipe import CompressionRecipe, Gate, ShareLayers
from rankd.compress.measured_speed import Speed
from rankd.compress.smaller_model import Start
from rankd.compress.speed_target import Limit, Target, pick, read_target
from rankd.compress.trials import Made, TrialRecord
from rankd.errors import ConfigError, TargetMissed
from rankd.gate_record import GatedMetric, GateRecord, Int8Record
from rankd.train.recipe import ModelChoice

GATE = Gate(bounds={"ndcg@10": 0.99, "gauc": 0.999})


def trial(name: str, cold: float, ndcg: float, gauc: float = 1.05, half: float = 0.002) -> TrialRecord:
    """A trial of so many milliseconds that keeps so much of both metrics."""
    metrics = {
        metric: GatedMetric(0.5, 0.5 * kept, kept, kept - half, kept + half, bound)
        for (metric, bound), kept in zip(GATE.bounds.items(), (ndcg, gauc), strict=True)
    }
    speed = Speed(cold, 2 * cold, cold / 4, cold / 2, 100_000 / cold, 400_000 / cold)
    gate = GateRecord("2026-01-01", "2026-01-08", 900, 300, 100, 0, metrics)
    made = Made(Start(ModelChoice("climber"), 0.5, 0.5, {}, 0.0), gate, speed, Speed(8, 16, 2, 4, 12_500, 50_000))
    return TrialRecord(name, f"recipe {name}", CompressionRecipe(steps=(ShareLayers(),)), 1.0, made)


SLOW, MIDDLE, FAST = trial("slow", 6.0, 1.01), trial("middle", 4.0, 1.0), trial("fast", 2.0, 0.97)
ALL = [FAST, TrialRecord("broken", "recipe broken", SLOW.recipe, 0.1, None, "cannot be met"), SLOW, MIDDLE]


def chosen(line: str, trials: list[TrialRecord] = ALL) -> str:
    return pick(trials, read_target(line, GATE), "ndcg@10").trial.trial_id


def test_a_line_is_read_with_its_units() -> None:
    line = "p99<=5ms, p50 <= 800us,warm_p50<=0.001s, Throughput >= 1.2e4/s, ndcg@10>=99.5%, gauc >= 0.99"
    assert read_target(line, GATE) == Target(
        (Limit("p99", 5.0), Limit("p50", 0.8), Limit("warm_p50", 1.0), Limit("throughput", 12_000.0)),
        {"ndcg@10": 0.995, "gauc": 0.99},
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "cannot be read; write p50<=5ms"),
        ("p99<=5ms,", "'' cannot be read"),
        ("p99=5ms", "'p99=5ms' cannot be read"),
        ("p99<5ms", "cannot be read"),
        ("p99<=5", "asked for like p99<=5ms, above 0 and with its unit"),
        ("p99>=5ms", "asked for like p99<=5ms"),
        ("p99<=0ms", "above 0"),
        ("p99<=5.5.5ms", r"'5.5.5' is no number"),
        ("throughput<=5000/s", "asked for like throughput>=20000/s"),
        ("throughput>=5000", "with its unit"),
        ("p95<=5ms", "no 'p95'; there is: p50, p99.*Did you mean 'p9?5?"),
        ("hr@10>=99%", "no 'hr@10'; there is: .*ndcg@10, gauc"),
        ("ndcg@10<=99%", "is a share of the original's value, like ndcg@10>=99%"),
        ("ndcg@10>=100%", "below 100%"),
        ("ndcg@10>=5ms", "is a share"),
    ],
)
def test_a_line_that_means_nothing_is_refused(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_target(line, GATE)


def test_of_those_that_reach_a_speed_the_most_accurate_is_chosen() -> None:
    assert chosen("p50<=7ms") == "slow"
    assert chosen("p50<=5ms") == "middle"
    assert chosen("throughput>=20000/s") == "middle"
    assert chosen("p99<=8ms, ndcg@10>=95%") == "middle"


def test_a_bound_that_is_named_takes_the_place_of_the_plans() -> None:
    assert chosen("p50<=3ms, ndcg@10>=96%") == "fast"
    assert chosen("ndcg@10>=96%") == "fast"  # no speed is asked for: the fastest that passes
    assert read_target("ndcg@10>=96%", GATE).gate(GATE).bounds == {"ndcg@10": 0.96, "gauc": 0.999}


def test_without_a_speed_the_fastest_that_passes_is_chosen() -> None:
    made = pick(ALL, Target(), "ndcg@10")
    assert made.trial is MIDDLE
    assert "of 3 recipes 2 meet the gate's bounds" in made.why
    assert "p50 4 ms (the original 8 ms); ndcg@10 keeps 1.0000 of the original (95%: 0.9980 to 1.0020)" in made.why


def in_int8(one: TrialRecord, ndcg: float, passes: float = 1.05) -> TrialRecord:
    """The same, whose quantized graphs keep so much."""
    assert one.made is not None
    gate = trial("any", 1.0, ndcg, passes).made
    assert gate is not None
    record = Int8Record("a test", "", 64, 10, ("score: head",), 0.05, "", gate.gate)
    return msgspec.structs.replace(one, made=msgspec.structs.replace(one.made, int8=record))


def test_what_serves_in_int8_is_chosen_by_its_quantized_graphs() -> None:
    narrow = in_int8(trial("narrow", 3.0, 1.02), 0.995)
    made = pick([MIDDLE, narrow], Target(), "ndcg@10")
    assert made.trial is narrow
    assert "ndcg@10 keeps 0.9950 of the original" in made.why
    assert chosen("p50<=5ms", [MIDDLE, narrow]) == "middle"  # 1.02 is what its floats keep, 0.995 what serves
    outcome = narrow.outcome("ndcg@10")
    assert outcome is not None
    assert (outcome.accuracy, outcome.floats) == (0.995, 0.1)


def test_int8_passes_only_if_it_passes_itself_and_in_floats() -> None:
    lost = in_int8(trial("lost", 3.0, 1.02), 0.97)
    odd = in_int8(trial("odd", 3.0, 0.97), 1.02)
    assert chosen("p50<=5ms", [lost, odd, MIDDLE]) == "middle"
    for one in (lost, odd):
        with pytest.raises(TargetMissed, match="none of 1 recipes meets"):
            chosen("p50<=5ms", [one])
    outcome = lost.outcome("ndcg@10")
    assert outcome is not None
    assert not outcome.hopeful


def test_a_choice_that_saves_no_time_says_so() -> None:
    assert "is no faster than the original" in pick([trial("late", 9.0, 1.0)], Target(), "ndcg@10").why
    assert "no faster" not in pick(ALL, Target(), "ndcg@10").why


def test_a_whole_interval_has_to_pass() -> None:
    assert chosen("p50<=5ms", [trial("sure", 4.5, 0.995), trial("wide", 4.0, 1.0, half=0.02)]) == "sure"


def test_what_nothing_meets_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        TargetMissed, match=r"none of 3 recipes meets p50 <= 3\.95 ms .*nearest is 'recipe middle'"
    ) as it:
        chosen("p50<=3.95ms")
    assert it.value.nearest_point == "middle"
    with pytest.raises(TargetMissed, match=r"'recipe fast' .*keeps 0\.9700 .* allowed is 0\.99 at the lower end"):
        chosen("p50<=1.9ms")
    with pytest.raises(TargetMissed, match="no recipe could be done"):
        chosen("p50<=3ms", [ALL[1]])
