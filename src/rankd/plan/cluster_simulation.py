"""A cluster without servers: requests go through a plan's steps (`request_work.py`) event by event, in made-up time.

In: when requests come and how large they are, what one takes, and how many servers there are. Out: when each was done,
and how busy servers were. Servers have executors, one a core, and a queue; a task has one executor, and the dense part
of a request as many as are idle when it begins. A main server sends the calls of a request as soon as it comes, on a
thread beside its executors, which then have less of their cores; when all answers are there the request waits for an
executor. Were calls sent by executors, they would wait for dense parts and come in bunches: p99 was twice as long on
slow wires. Requests go to the servers of a kind in turn. Threads share the cores of their server, or of the one machine
of all servers, as an operating system shares them (`shared_cores.py`). Not simulated: links that several requests
share, and memory bandwidth that cores share.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rankd.plan.cluster_shape import ClusterShape
from rankd.plan.cost_model import CostModel
from rankd.plan.queueing import Times
from rankd.plan.request_work import RequestWork
from rankd.plan.shared_cores import Events, Happens, SharedCores

WARM = 0.2
"""Of the requests: the first ones find an empty cluster and are left out of quantiles."""


@dataclass(frozen=True, slots=True)
class ClusterRequests:
    """When each comes, ascending, in us, and how many samples it has; (n,) float64 both."""

    at_us: Times
    samples: Times


@dataclass(frozen=True, slots=True)
class Stragglers:
    """This share of calls takes so many times as long on its shard."""

    share: float = 0.0
    times: float = 10.0


@dataclass(frozen=True, slots=True)
class SimulatedCluster:
    """`latency_us` (n,) of each request; the CPU in us of each main server and of each server of each shard; and when
    all was over."""

    latency_us: Times
    main_us: tuple[float, ...]
    shard_us: tuple[tuple[float, ...], ...]
    ended_us: float

    @property
    def settled_us(self) -> Times:
        """Latencies of the requests after the first ones."""
        return self.latency_us[int(len(self.latency_us) * WARM) :]

    def quantile_ms(self, share: float) -> float:
        """Of the requests after the first ones."""
        return float(np.quantile(self.settled_us, share)) / 1e3

    def busiest(self, costs: CostModel) -> float:
        """The busy share of main servers, or of the servers of the busiest shard, each kind as a whole; of the machine,
        if all share one."""
        if costs.machine_cores is not None:
            worked_us = sum(self.main_us) + sum(sum(replicas) for replicas in self.shard_us)
            return worked_us / (costs.machine_cores * self.ended_us)
        kinds = [(self.main_us, costs.main_cores), *((replicas, costs.shard_cores) for replicas in self.shard_us)]
        return max(sum(worked) / (len(worked) * cores * self.ended_us) for worked, cores in kinds)


@dataclass(slots=True)
class _Task:
    """Takes an executor for `takes_us`; `ends` is told the moment. `pieces` follow at once, if there are any: what each
    takes if so many executors may share them."""

    takes_us: float
    ends: Happens
    pieces: Callable[[int], Sequence[float]] | None = None


@dataclass(slots=True)
class _Server:
    """`idle` of its executors; `cores` are what its threads run on."""

    idle: int
    cores: SharedCores
    waiting: deque[_Task] = field(default_factory=deque)
    worked_us: float = 0.0


class _Simulation:
    def __init__(self, work: RequestWork, shape: ClusterShape, costs: CostModel, stragglers: Stragglers) -> None:
        self._work, self._stragglers = work, stragglers
        self.events = Events()
        machine = SharedCores(self.events, costs.machine_cores) if costs.machine_cores is not None else None

        def server(cores: int) -> _Server:
            return _Server(cores, machine or SharedCores(self.events, cores))

        self.mains = [server(costs.main_cores) for _ in range(shape.mains)]
        self.shards = [[server(costs.shard_cores) for _ in range(number)] for number in shape.replicas]
        self._random = np.random.default_rng(0)

    def arrives(self, number: int, samples: float, ended: Happens, now: float) -> None:
        """Request `number` comes to a main server, which sends its calls, and looks up what it has itself when it has
        their answers."""
        work = self._work
        main = self.mains[number % len(self.mains)]
        left = len(work.calls)

        def pieces(idle: int) -> list[float]:
            return [work.piece_us(piece, samples) for piece in work.pieces(samples, idle)]

        def there(then: float) -> None:
            main.waiting.append(_Task((work.local_us + work.join_us).at(samples), ended, pieces))
            self._serve(main, then)

        def answered(then: float) -> None:
            nonlocal left
            left -= 1
            if not left:
                there(then)

        def sent(then: float) -> None:
            self._call(number, samples, answered, then)

        if not work.calls:
            there(now)
            return
        send_us = work.send_us.at(samples)
        main.worked_us += send_us
        main.cores.run(send_us, sent, now)

    def _call(self, number: int, samples: float, answered: Happens, sent: float) -> None:
        """All calls of a request leave at `sent`; each answer comes after the wire, the queue and the service."""
        way_us = self._work.wire_us.at(samples) / 2
        for call in self._work.calls:
            replicas = self.shards[call.shard]
            takes_us = call.serve_us.at(samples)
            if self._stragglers.share and self._random.random() < self._stragglers.share:
                takes_us *= self._stragglers.times
            task = _Task(takes_us, lambda then: self.events.at(then + way_us, answered))
            self.events.at(sent + way_us, self._comes(replicas[number % len(replicas)], task))

    def _comes(self, server: _Server, task: _Task) -> Happens:
        def comes(now: float) -> None:
            server.waiting.append(task)
            self._serve(server, now)

        return comes

    def _serve(self, server: _Server, now: float) -> None:
        """Give idle executors work, if there is any."""
        while server.idle and server.waiting:
            task = server.waiting.popleft()
            server.idle -= 1
            server.worked_us += task.takes_us
            server.cores.run(task.takes_us, self._ends(server, task), now)

    def _ends(self, server: _Server, task: _Task) -> Happens:
        def ends(now: float) -> None:
            server.idle += 1
            if task.pieces is None:
                task.ends(now)
            else:
                self._share(server, task.pieces, task.ends, now)
            self._serve(server, now)

        return ends

    def _share(self, server: _Server, pieces: Callable[[int], Sequence[float]], ended: Happens, now: float) -> None:
        """Begin all pieces at once, on the executor that is there and those which nobody else waits for."""
        begun = pieces(max(server.idle - len(server.waiting), 1))
        left = len(begun)

        def ends(then: float) -> None:
            nonlocal left
            left -= 1
            server.idle += 1
            if not left:
                ended(then)
            self._serve(server, then)

        for takes_us in begun:
            server.idle -= 1
            server.worked_us += takes_us
            server.cores.run(takes_us, ends, now)


def poisson_requests(costs: CostModel, number: int, seed: int = 0) -> ClusterRequests:
    """So many requests at the cost model's rate and sizes."""
    random = np.random.default_rng(seed)
    at_us = np.cumsum(random.exponential(1e6 / costs.rate, number))
    return ClusterRequests(at_us, random.choice(np.asarray(costs.samples, np.float64), number))


def simulate_cluster(
    requests: ClusterRequests,
    work: RequestWork,
    shape: ClusterShape,
    costs: CostModel,
    stragglers: Stragglers | None = None,
) -> SimulatedCluster:
    """Run all requests to their end."""
    simulation = _Simulation(work, shape, costs, stragglers or Stragglers())
    latency_us = np.zeros(len(requests.at_us))

    def comes(number: int, at_us: float, samples: float) -> Happens:
        def ended(now: float) -> None:
            latency_us[number] = now - at_us

        return lambda now: simulation.arrives(number, samples, ended, now)

    for number, (at_us, samples) in enumerate(zip(requests.at_us.tolist(), requests.samples.tolist(), strict=True)):
        simulation.events.at(at_us, comes(number, at_us, samples))
    ended_us = simulation.events.run()
    return SimulatedCluster(
        latency_us,
        tuple(server.worked_us for server in simulation.mains),
        tuple(tuple(server.worked_us for server in replicas) for replicas in simulation.shards),
        ended_us,
    )
