"""What a request takes a server beside its embedding tables: the dense part of the costs that plans reckon with.

In: a server that has all tables itself, and requests of many sizes. Out: CPU of a request as a line over its samples.
One request at a time: HTTP, features, assembly, the engine, everything is in it, and the tables' look-ups too, which
whoever asks takes off. Small and large requests are sent apart, each mixed as they come: an engine takes longer for a
call that follows one of another shape, and requests of one size alone would not show that.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from rankd.artifact import Artifact
from rankd.bench.load import LoadPlan, generate
from rankd.bench.placement import cpu_seconds
from rankd.bench.served_model import ServedModel
from rankd.bench.wire_forms import Form, encode_request
from rankd.errors import ConfigError, EngineFailure
from rankd.features.catalogue import Catalogue
from rankd.plan.request_work import Line
from rankd.types import RankRequest

REQUESTS = 64
WARM = 8


def served_cpu(server: ServedModel, requests: Sequence[RankRequest], seconds: float) -> Line:
    """CPU in us of a request, small and large ones sent for so many seconds each.

    Raises:
        EngineFailure: a request was not answered with 200.
    """
    taken = []
    for some in small_and_large(requests):
        wire = encoded(some)
        generate(LoadPlan(server.host, server.port, wire[:WARM], seconds=0.0, warmup=WARM))
        before = cpu_seconds(server.pid)
        result = generate(LoadPlan(server.host, server.port, wire, seconds=seconds))
        if set(result.statuses) != {200}:
            raise EngineFailure(f"requests were answered with {sorted(set(result.statuses))}")
        samples = statistics.mean(len(some[index].candidates) for index in result.index)
        taken.append((samples, (cpu_seconds(server.pid) - before) * 1e6 / len(result.statuses)))
    return line_through(taken)


def small_and_large(requests: Sequence[RankRequest]) -> list[list[RankRequest]]:
    """The smaller half and the larger one, each in the order given; all together if none is larger than another."""
    sizes = sorted(len(request.candidates) for request in requests)
    middle = sizes[len(sizes) // 2]
    halves = [
        [request for request in requests if len(request.candidates) < middle],
        [request for request in requests if len(request.candidates) >= middle],
    ]
    return [half for half in halves if half]


def line_through(taken: Sequence[tuple[float, float]]) -> Line:
    """The line through one or two points (samples, us) that neither falls nor begins below nothing."""
    (few, small_us), (many, large_us) = taken[0], taken[-1]
    if many > few and large_us < small_us:
        return Line(statistics.mean((small_us, large_us)), 0.0)
    each = (large_us - small_us) / (many - few) if many > few else large_us / many
    if small_us < few * each:
        return Line(0.0, statistics.mean((small_us / few, large_us / many)))
    return Line(small_us - few * each, each)


def version_requests(opened: Artifact) -> list[RankRequest]:
    """Requests for a version's own users and items, as large as any of its candidate buckets.

    Raises:
        ConfigError: it has no users, or too few items.
    """
    ids = Catalogue.load(opened.path / "tables", opened.schema).ids
    sizes = [size for size in opened.schema.candidate_buckets if size <= len(ids.items)]
    if not ids.users or not sizes:
        raise ConfigError(f"{opened.path} has {len(ids.items)} items and {len(ids.users)} users; requests need some")
    random = np.random.default_rng(0)

    def request(number: int) -> RankRequest:
        chosen = random.choice(len(ids.items), int(random.choice(sizes)), replace=False).tolist()
        user = ids.users[number % len(ids.users)]
        return RankRequest(user, tuple(ids.items[one] for one in chosen), model=opened.path.resolve().parent.name)

    return [request(number) for number in range(REQUESTS)]


def encoded(requests: Sequence[RankRequest]) -> list[bytes]:
    """As they are sent."""
    return [encode_request(Form.BINARY, request) for request in requests]
