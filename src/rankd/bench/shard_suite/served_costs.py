"""What a request takes a server beside its embedding tables: the dense part of the costs that plans reckon with.

In: a server that has all tables itself, and requests of some sizes. Out: CPU of a request as a line over its samples.
One request at a time: HTTP, features, assembly, the engine, everything is in it, and the tables' look-ups too, which
whoever asks takes off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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

REQUESTS = 32
WARM = 8


def served_cpu(server: ServedModel, encoded: Mapping[int, list[bytes]], seconds: float) -> Line:
    """CPU in us of requests with so many samples each, sent for so many seconds a size.

    Raises:
        EngineFailure: a request was not answered with 200.
    """
    taken = {}
    for samples, requests in encoded.items():
        generate(LoadPlan(server.host, server.port, requests[:WARM], seconds=0.0, warmup=WARM))
        before = cpu_seconds(server.pid)
        result = generate(LoadPlan(server.host, server.port, requests, seconds=seconds))
        if set(result.statuses) != {200}:
            raise EngineFailure(f"requests of {samples} candidates were answered with {sorted(set(result.statuses))}")
        taken[samples] = (cpu_seconds(server.pid) - before) * 1e6 / len(result.statuses)
    return line_through(taken)


def line_through(taken: Mapping[int, float]) -> Line:
    """The line nearest to all sizes, as shares of what each takes; it neither falls nor begins below nothing."""
    sizes, values = np.asarray(list(taken), np.float64), np.asarray(list(taken.values()))
    if len(taken) > 1:
        each, fixed = np.polyfit(sizes, values, 1, w=1 / np.maximum(values, 1.0))
        if fixed >= 0 and each >= 0:
            return Line(float(fixed), float(each))
    return Line(0.0, float(np.mean(values / sizes)))


def requests_of_sizes(opened: Artifact) -> dict[int, list[bytes]]:
    """Requests for a version's own users and items: of its smallest, a middle and its largest candidate bucket.

    Raises:
        ConfigError: it has no users, or too few items.
    """
    ids = Catalogue.load(opened.path / "tables", opened.schema).ids
    buckets = opened.schema.candidate_buckets
    sizes = sorted({buckets[0], buckets[len(buckets) // 2], buckets[-1]})
    sizes = [size for size in sizes if size <= len(ids.items)]
    if not ids.users or not sizes:
        raise ConfigError(f"{opened.path} has {len(ids.items)} items and {len(ids.users)} users; requests need some")
    random = np.random.default_rng(0)

    def request(size: int, number: int) -> RankRequest:
        chosen = random.choice(len(ids.items), size, replace=False).tolist()
        user = ids.users[number % len(ids.users)]
        return RankRequest(user, tuple(ids.items[one] for one in chosen), model=opened.path.resolve().parent.name)

    return {size: encoded([request(size, number) for number in range(REQUESTS)]) for size in sizes}


def encoded(requests: Sequence[RankRequest]) -> list[bytes]:
    """As they are sent."""
    return [encode_request(Form.BINARY, request) for request in requests]
