"""How long a task waits for one of c cores: M/G/c, by the Allen-Cunneen approximation.

Poisson arrivals, any service time. That a task waits at all has Erlang's C as its chance; how long, if it does, is
taken as exponential, with the mean of M/M/c times (1 + cv²) / 2, cv² the squared coefficient of variation of service.
Both are exact for M/M/c, the mean also for M/G/1 (Pollaczek-Khinchine).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Queue:
    """`busy` is the share of its cores; if that is below 1, a task waits with the chance `waits`, and then
    `wait_us` in the mean."""

    busy: float
    waits: float
    wait_us: float

    @property
    def mean_wait_us(self) -> float:
        """Over all tasks."""
        return self.waits * self.wait_us

    def draw(self, random: np.random.Generator, count: int) -> Times:
        """Waits of so many tasks, independent of each other."""
        waiting = random.random(count) < self.waits
        return np.where(waiting, random.exponential(self.wait_us, count), 0.0)


def queue_of(rate: float, service_us: Sequence[float], cores: int) -> Queue:
    """Tasks at `rate` a second whose service times are equally likely; waits are infinite if they are too many."""
    mean = sum(service_us) / len(service_us)
    square = sum(one * one for one in service_us) / len(service_us)
    return queue_of_moments(rate, mean, square, cores)


def queue_of_moments(rate: float, mean_us: float, square_us: float, cores: int) -> Queue:
    """The same by the mean of service and the mean of its square."""
    if not mean_us:
        return Queue(0.0, 0.0, 0.0)
    busy = rate * mean_us / 1e6 / cores
    if busy >= 1:
        return Queue(busy, 1.0, float("inf"))
    waits = erlang_c(busy * cores, cores)
    wait_us = mean_us / (cores * (1 - busy)) * square_us / mean_us**2 / 2
    return Queue(busy, waits, wait_us)


def erlang_c(offered: float, cores: int) -> float:
    """The chance that all cores are busy, `offered` being arrivals in a mean service time, below `cores`."""
    blocked = 1.0
    for number in range(1, cores + 1):
        blocked = offered * blocked / (number + offered * blocked)
    return blocked / (1 - offered / cores * (1 - blocked))
