"""The configuration of a model that may answer from lighter variants while there is more to do than it can."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from rankd.errors import ConfigError

Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(gt=0, le=1)]
Name = Annotated[str, Meta(min_length=1)]


class ElasticConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`variants` are versions of the model, the one that is to come first first. Each has to have passed the accuracy
    gate against the run of the full version, and with `bounds` (metric to the share that is kept at least) also these.

    One more variant may answer when more than `to_lighter_ms` of predicted work wait for each core, or when a request
    is refused for want of time while the load is above `to_full_load`. The full version answers alone again when at
    most `to_full_ms` have waited and it could do what comes with `to_full_load` of its time, for `calm_seconds`.
    Between two changes are `dwell_seconds` at least, and loads are means over about as long.
    """

    variants: Annotated[tuple[Name, ...], Meta(min_length=1)]
    bounds: dict[str, Share] = {}
    to_lighter_ms: Positive = 100.0
    to_full_ms: Positive = 50.0
    to_full_load: Share = 0.8
    dwell_seconds: Positive = 1.0
    calm_seconds: Positive = 5.0


def check_elastic(name: str, config: ElasticConfig, max_waiting_ms: float) -> None:
    """What types do not say. `max_waiting_ms` is how much work the schedule lets wait.

    Raises:
        ConfigError: thresholds in the wrong order, or a variant that is named twice.
    """
    if config.to_full_ms >= config.to_lighter_ms:
        raise ConfigError(
            f"elastic.{name}: to_full_ms is {config.to_full_ms:g} and to_lighter_ms {config.to_lighter_ms:g}; the "
            "first has to be below the second, or the model would change back and forth"
        )
    if config.to_lighter_ms >= max_waiting_ms:
        raise ConfigError(
            f"elastic.{name}: to_lighter_ms is {config.to_lighter_ms:g}, and requests are refused when "
            f"schedule.max_waiting_ms = {max_waiting_ms:g} wait; set it below that"
        )
    if twice := [one for one in dict.fromkeys(config.variants) if config.variants.count(one) > 1]:
        raise ConfigError(f"elastic.{name}: variants names '{twice[0]}' twice; name each version once")
