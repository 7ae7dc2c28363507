"""What a layout costs over singular, and what `auto` took over the best of them.

In: layouts with their figures round by round, singular first. Out: the ratios of the suite. All are between
measurements of one round, and medians of the rounds.

*The best of several that were measured is partly the luckiest.* So the ratios that end in `_left_out` take for the best
of a round the one that was best in the other rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from rankd.bench.report import Row, percentile
from rankd.bench.shard_suite.layouts import Layout


def layout_ratios(layouts: Sequence[Layout], results: Sequence[Row], auto: Layout) -> dict[str, float]:
    """The ratios of all layouts; `results` have what was predicted of each."""
    singular = layouts[0].rounds
    p99, cpu = dict[str, list[float]](), dict[str, list[float]]()
    for layout in layouts[1:]:
        pairs = list(zip(layout.rounds, singular, strict=True))
        p99[layout.name] = [one["p99_ms"] / alone["p99_ms"] for one, alone in pairs]
        cpu[layout.name] = [
            (one["server_cpu_ms"] + one["shards_cpu_ms"]) / (alone["server_cpu_ms"] + alone["shards_cpu_ms"])
            for one, alone in pairs
        ]
    middle = {name: statistics.median(ratios) for name, ratios in p99.items()}
    best = min(middle, key=lambda name: middle[name])
    of_all = [percentile(layout.latencies_ms, 0.99) for layout in layouts]
    apart = {layout.name: float(row["apart_p99_ms"]) for layout, row in zip(layouts, results, strict=True)}
    errors = [abs(float(row["p99_error"])) for row in results]
    ratios = {
        "p99_overhead_best": middle[best],
        "p99_overhead_best_of_all": min(of_all[1:]) / of_all[0],
        "p99_overhead_best_simulated": min(apart[name] for name in p99) / apart[layouts[0].name],
        "p99_overhead_auto": middle[auto.name],
        "auto_over_best": middle[auto.name] / middle[best],
        "cpu_overhead_best": statistics.median(cpu[best]),
        "p99_prediction_error_median": statistics.median(errors),
        "p99_prediction_error_largest": max(errors),
    }
    return ratios | left_out(p99, auto.name) | {f"p99_overhead {name}": value for name, value in middle.items()}


def left_out(p99: Mapping[str, Sequence[float]], auto: str) -> dict[str, float]:
    """The best over singular, and `auto` over the best, where the best of a round is that of the others; nothing of one
    round. `p99` has ratios over singular, by layout and round."""
    rounds = range(len(p99[auto]))
    if len(rounds) < 2:
        return {}
    best = [
        min(p99, key=lambda name: statistics.median(p99[name][one] for one in rounds if one != number))
        for number in rounds
    ]
    return {
        "p99_overhead_best_left_out": statistics.median(p99[best[number]][number] for number in rounds),
        "auto_over_best_left_out": statistics.median(
            p99[auto][number] / p99[best[number]][number] for number in rounds
        ),
    }
