"""What a user asks of a compressed model, in a line, and which of the tried recipes answers it best.

    p99 <= 5ms, ndcg@10 >= 99%

In: the line, finished trials. Out: a `Pick` with its reason. Speeds are those that `measured_speed.py` measured,
quality is the lower end of what the gate found on the choosing days.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from rankd.compress.compression_recipe import Gate
from rankd.compress.measured_speed import Speed
from rankd.compress.trials import Made, TrialRecord
from rankd.errors import ConfigError, TargetMissed, nearest
from rankd.gate_record import GateRecord

SPEEDS = {
    "p50": "cold_p50_ms",
    "p99": "cold_p99_ms",
    "warm_p50": "warm_p50_ms",
    "warm_p99": "warm_p99_ms",
    "throughput": "cold_throughput",
    "warm_throughput": "warm_throughput",
}
"""Words of a target and the fields of `Speed`; what is not called warm encodes the history of each request."""

UNITS = {"ms": 1.0, "us": 1e-3, "s": 1e3}
TERM = re.compile(r"([a-z0-9_@]+)\s*(<=|>=)\s*([0-9.]+(?:e[0-9]+)?)\s*(ms|us|s|/s|%)?", re.IGNORECASE)
FORMS = (
    "p50<=5ms, p99<=5ms, warm_p50<=1ms, throughput>=20000/s (candidates) or ndcg@10>=99%, several with commas between"
)


@dataclass(frozen=True, slots=True)
class Limit:
    """One speed: its word, and the most milliseconds or the fewest candidates a second."""

    word: str
    value: float

    @property
    def at_most(self) -> bool:
        """Whether less is better."""
        return self.word.endswith(("p50", "p99"))

    def of(self, speed: Speed) -> float:
        """The speed that it speaks of."""
        value: float = getattr(speed, SPEEDS[self.word])
        return value

    def shortfall(self, speed: Speed) -> float:
        """By which share it is missed; 0 if it is met."""
        found = self.of(speed)
        return max((found / self.value if self.at_most else self.value / found) - 1, 0.0)

    def shown(self) -> str:
        """It in words."""
        return f"{self.word} {'<=' if self.at_most else '>='} {self.figure(self.value)}"

    def figure(self, value: float) -> str:
        """A value of its speed in words."""
        return f"{value:.4g} ms" if self.at_most else f"{value:,.0f}/s"


@dataclass(frozen=True, slots=True)
class Target:
    """Speeds to reach, and bounds of the gate that were named; those take the place of the plan's."""

    limits: tuple[Limit, ...] = ()
    bounds: Mapping[str, float] = field(default_factory=dict)

    def gate(self, gate: Gate) -> Gate:
        """A plan's gate with the bounds of this target."""
        return msgspec.structs.replace(gate, bounds={**gate.bounds, **self.bounds})

    def judged(self, record: GateRecord) -> GateRecord:
        """A decision under the bounds of this target."""
        metrics = {
            name: msgspec.structs.replace(one, bound=self.bounds.get(name, one.bound))
            for name, one in record.metrics.items()
        }
        return msgspec.structs.replace(record, metrics=metrics)

    def shown(self) -> str:
        """The target in words; the gate's bounds alone if nothing was named."""
        words = [one.shown() for one in self.limits]
        words += [f"{name} >= {bound:.4g} of the original" for name, bound in self.bounds.items()]
        return ", ".join(words) or "the gate's bounds"


@dataclass(frozen=True, slots=True)
class Pick:
    """A trial and why it is the one."""

    trial: TrialRecord
    why: str


def read_target(text: str, gate: Gate) -> Target:
    """A target by its line.

    Raises:
        ConfigError: a word, a direction, a unit or a value that means nothing.
    """
    limits, bounds = [], {}
    for term in text.split(","):
        found = TERM.fullmatch(term.strip())
        if found is None:
            raise ConfigError(f"--to '{text}': '{term.strip()}' cannot be read; write {FORMS}")
        word, sign, digits, unit = (
            found.group(1).lower(),
            found.group(2),
            found.group(3),
            (found.group(4) or "").lower(),
        )
        try:
            value = float(digits)
        except ValueError as error:
            raise ConfigError(f"--to '{text}': '{digits}' is no number") from error
        if word in SPEEDS:
            limits.append(_limit(text, word, sign, value, unit))
        elif word in gate.bounds:
            bounds[word] = _bound(text, word, sign, value, unit)
        else:
            known = [*SPEEDS, *gate.bounds]
            raise ConfigError(f"--to '{text}': no '{word}'; there is: {', '.join(known)}.{nearest(word, known)}")
    return Target(tuple(limits), bounds)


def pick(trials: Sequence[TrialRecord], target: Target, accuracy: str) -> Pick:
    """The trial that answers a target best.

    Where a speed is asked for: of those that reach it and pass the gate the one that keeps the most `accuracy`.
    Otherwise: of those that pass the gate the one with the least cold p50.

    Raises:
        TargetMissed: nothing meets the target; with the trial that comes nearest.
    """
    made = [(one, one.made) for one in trials if one.made is not None]
    if not made:
        raise TargetMissed("no recipe could be done; look at the failures in front.json, or give another --plan")
    good = [(one, what) for one, what in made if not _shortfall(what, target)]
    if not good:
        nearest_one, what = min(made, key=lambda pair: _shortfall(pair[1], target))
        raise TargetMissed(
            f"none of {len(made)} recipes meets {target.shown()} on the choosing days; the nearest is "
            f"'{nearest_one.label}' ({nearest_one.trial_id}): {_figures(what, target, accuracy)}. "
            "Search longer with more --minutes, or ask for less",
            nearest_one.trial_id,
        )
    if target.limits:
        best, what = max(good, key=lambda pair: (_kept(pair[1], accuracy), -pair[1].speed.cold_p50_ms))
        rule = f"keeps the most {accuracy}"
    else:
        best, what = min(good, key=lambda pair: (pair[1].speed.cold_p50_ms, -_kept(pair[1], accuracy)))
        slower = what.speed.cold_p50_ms >= what.original_speed.cold_p50_ms
        rule = "has the least cold p50" + (", and is no faster than the original" if slower else "")
    return Pick(
        best,
        f"of {len(made)} recipes {len(good)} meet {target.shown()} and pass the gate on the choosing days; of these "
        f"'{best.label}' {rule}: {_figures(what, target, accuracy)}",
    )


def _limit(text: str, word: str, sign: str, value: float, unit: str) -> Limit:
    at_most = Limit(word, value).at_most
    if value <= 0 or sign != ("<=" if at_most else ">=") or unit not in (UNITS if at_most else ("/s",)):
        example = f"{word}<=5ms" if at_most else f"{word}>=20000/s"
        raise ConfigError(f"--to '{text}': '{word}' is asked for like {example}, above 0 and with its unit")
    return Limit(word, value * UNITS[unit] if at_most else value)


def _bound(text: str, word: str, sign: str, value: float, unit: str) -> float:
    share = value / 100 if unit == "%" else value
    if sign != ">=" or unit not in ("", "%") or not 0 < share < 1:
        raise ConfigError(
            f"--to '{text}': '{word}' is a share of the original's value, like {word}>=99% or {word}>=0.99, below 100%"
        )
    return share


def _shortfall(made: Made, target: Target) -> float:
    """By how much a trial misses speeds and bounds, in shares of them; 0 if it meets all."""
    return sum(one.shortfall(made.speed) for one in target.limits) + max(
        sum(max(one.bound / one.low - 1, 0.0) if one.low > 0 else 1.0 for one in target.judged(gate).metrics.values())
        for gate in made.gates
    )


def _kept(made: Made, accuracy: str) -> float:
    return made.served_gate.metrics[accuracy].kept


def _figures(made: Made, target: Target, accuracy: str) -> str:
    """The figures of a trial that a target speaks of, each beside the original's; and metrics that miss their bound."""
    limits = target.limits or (Limit("p50", 1.0),)
    words = [
        f"{one.word} {one.figure(one.of(made.speed))} (the original {one.figure(one.of(made.original_speed))})"
        for one in limits
    ]
    gate = target.judged(made.served_gate)
    shown = {accuracy: gate.metrics[accuracy]} | {name: one for name, one in gate.metrics.items() if not one.passed}
    for name, one in shown.items():
        missed = "" if one.passed else f", allowed is {one.bound:g} at the lower end"
        words.append(f"{name} keeps {one.kept:.4f} of the original (95%: {one.low:.4f} to {one.high:.4f}{missed})")
    return "; ".join(words)
