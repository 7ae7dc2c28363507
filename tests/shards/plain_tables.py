"""Tables in NumPy, pooled by a loop: what shards are tested against, and with."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Self

import numpy as np
from hypothesis import strategies as st

from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.table_spec import TablePart, TableSpec
from rankd.errors import InvalidRequest
from rankd.shards.shard_config import ShardClientConfig, ShardServerConfig
from rankd.shards.shard_layout import Net, Shard, ShardLayout
from rankd.shards.shard_server import ShardServer
from rankd.shards.sharded_pooling import ShardedPooling
from rankd.types import Float32Array


class PlainPooling:
    """`Pooling` over (rows, dim) arrays by name. `before` is called at each request."""

    def __init__(self, tables: Mapping[str, Float32Array], before: Callable[[], None] = lambda: None) -> None:
        self._tables, self._before = tables, before

    def pool(self, asked: JaggedIds) -> Float32Array:
        """As `Pooling.pool`."""
        self._before()
        asked.check()
        samples = asked.num_samples
        found = []
        for number, name in enumerate(asked.tables):
            if name not in self._tables:
                raise InvalidRequest(f"there is no table '{name}'")
            rows = self._tables[name]
            sums = np.zeros((samples, rows.shape[1]), np.float32)
            for sample in range(samples):
                begin, end = asked.offsets[number * samples + sample : number * samples + sample + 2]
                ids = asked.ids[begin:end]
                if len(ids) and not (ids.min() >= 0 and ids.max() < len(rows)):
                    raise InvalidRequest(f"table '{name}' has rows 0 to {len(rows) - 1}")
                sums[sample] = rows[ids].sum(axis=0, dtype=np.float32)
            found.append(sums)
        return np.concatenate(found, axis=1) if found else np.zeros((samples, 0), np.float32)


def values_of(spec: TableSpec) -> Float32Array:
    """The rows of a table, the same in every process."""
    random = np.random.default_rng(zlib.crc32(spec.name.encode()))
    return random.standard_normal((spec.rows, spec.dim), np.float32)


def specs_of(layout: ShardLayout) -> dict[str, TableSpec]:
    """All tables by name."""
    return {spec.name: spec for net in layout.nets for spec in net.tables}


def whole(layout: ShardLayout) -> PlainPooling:
    """All tables in one place."""
    return PlainPooling({name: values_of(spec) for name, spec in specs_of(layout).items()})


def part_of(layout: ShardLayout, shard: Shard, before: Callable[[], None] = lambda: None) -> PlainPooling:
    """What a shard has."""
    specs = specs_of(layout)
    return PlainPooling({p.table: values_of(specs[p.table])[p.remainder :: p.modulus] for p in shard.parts}, before)


def jagged(tables: Sequence[str], ids: Sequence[Sequence[Sequence[int]]]) -> JaggedIds:
    """`ids` by table and sample."""
    lists = [sample for table in ids for sample in table]
    offsets = np.cumsum([0, *(len(sample) for sample in lists)], dtype=np.int64)
    return JaggedIds(tuple(tables), offsets, np.array([one for sample in lists for one in sample], np.int64))


def random_ids(layout: ShardLayout, samples: int, seed: int) -> JaggedIds:
    """0 to 5 ids for each sample and table."""
    random = np.random.default_rng(seed)
    specs = specs_of(layout)
    return jagged(
        list(specs),
        [
            [random.integers(0, spec.rows, random.integers(0, 6)).tolist() for _ in range(samples)]
            for spec in specs.values()
        ],
    )


@st.composite
def layouts(draw: st.DrawFn) -> ShardLayout:
    """Up to 5 tables in up to 3 nets, on up to 3 shards with up to 2 replicas; addresses are still to come."""
    num_shards = draw(st.integers(1, 3))
    tables = [
        TableSpec(f"t{number}", draw(st.sampled_from([1, 2, 7, 300, 70_000])), draw(st.integers(1, 5)))
        for number in range(draw(st.integers(1, 5)))
    ]
    num_nets = draw(st.integers(1, min(3, len(tables))))
    nets = tuple(Net(f"n{number}", tuple(tables[number::num_nets])) for number in range(num_nets))
    parts: list[list[TablePart]] = [[] for _ in range(num_shards)]
    for spec in tables:
        modulus = draw(st.integers(1, num_shards))
        for remainder, shard in enumerate(draw(st.permutations(range(num_shards)))[:modulus]):
            parts[shard].append(TablePart(spec.name, modulus, remainder))
    replicas = st.lists(st.just("127.0.0.1:1"), min_size=1, max_size=2).map(tuple)
    shards = tuple(Shard(f"s{number}", draw(replicas), tuple(some)) for number, some in enumerate(parts))
    return ShardLayout("drawn", nets, shards)


@st.composite
def questions(draw: st.DrawFn, layout: ShardLayout, most_samples: int = 5) -> JaggedIds:
    """Some of the tables in any order, also twice; samples that have ids in common."""
    specs = specs_of(layout)
    names = draw(st.lists(st.sampled_from(sorted(specs)), max_size=6))
    samples = draw(st.integers(1, most_samples)) if names else 0
    lists = []
    for name in names:
        some = st.lists(st.integers(0, specs[name].rows - 1), max_size=4)
        # A few that come again and again: to draw one for each of hundreds of samples takes too long.
        drawn, seed = draw(st.lists(some, min_size=1, max_size=12)), draw(st.integers(0, 99))
        chosen = np.random.default_rng(seed).integers(0, len(drawn), samples)
        lists.append([drawn[number] for number in chosen.tolist()])
    return jagged(names, lists)


def two_shards(first: Sequence[str] = ("127.0.0.1:1",), second: Sequence[str] = ("127.0.0.1:1",)) -> ShardLayout:
    """Shards a and b: table item split over both, user whole on a, city whole on b."""
    return ShardLayout(
        "plan-1",
        (
            Net("users", (TableSpec("user", 50, 3), TableSpec("city", 9, 2))),
            Net("items", (TableSpec("item", 101, 4),)),
        ),
        (
            Shard("a", tuple(first), (TablePart("item", 2, 0), TablePart("user"))),
            Shard("b", tuple(second), (TablePart("item", 2, 1), TablePart("city"))),
        ),
    )


def one_shard(*addresses: str) -> ShardLayout:
    """Shard a with table item."""
    net = Net("items", (TableSpec("item", 101, 4),))
    return ShardLayout("plan-1", (net,), (Shard("a", addresses or ("127.0.0.1:1",), (TablePart("item"),)),))


def make_server(
    layout: ShardLayout,
    shard: int = 0,
    config: ShardServerConfig | None = None,
    before: Callable[[], None] = lambda: None,
    contents: Mapping[str, str] | None = None,
) -> ShardServer:
    """A server of a shard, not started."""
    described = layout.shards[shard]
    pooling = part_of(layout, described, before)
    return ShardServer(pooling, layout.plan, layout.served_by(described), config or ShardServerConfig(), contents)


@contextmanager
def serving(*servers: ShardServer) -> Iterator[list[str]]:
    """The addresses of servers in threads of this process."""
    for server in servers:
        server.start()
    try:
        yield [server.address for server in servers]
    finally:
        for server in servers:
            server.close()


@contextmanager
def asking(
    layout: ShardLayout, config: ShardClientConfig | None = None, hot_rows: Mapping[str, int] | None = None
) -> Iterator[ShardedPooling]:
    """A client of a layout, as soon as all of its replicas are up."""
    pooling = ShardedPooling(layout, config or ShardClientConfig(timeout_ms=30_000), hot_rows)
    pooling.start()
    try:
        until(lambda: pooling.replicas_up() == {shard.name: len(shard.addresses) for shard in layout.shards})
        yield pooling
    finally:
        pooling.close()


def quick(**more: float) -> ShardClientConfig:
    """Reconnects and looks for signs of life soon."""
    config = {"timeout_ms": 2000.0, "first_wait_seconds": 0.01, "longest_wait_seconds": 0.1, "heartbeat_seconds": 0.2}
    config.update(connect_seconds=0.5, hedge_least_ms=5.0)
    return ShardClientConfig(**(config | more))  # type: ignore[arg-type]


class Asking:
    """Threads that ask all the time, until the end of the block: `_run`, of the n-th one, ends when `_stop` is set."""

    def __init__(self, threads: int) -> None:
        self.right = 0
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(threads)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        raise NotImplementedError


def until(true: Callable[[], bool], within_s: float = 30.0) -> None:
    """Wait until something is so."""
    end = time.perf_counter() + within_s
    while not true():
        assert time.perf_counter() < end, "it did not come about"
        time.sleep(0.005)


class Hold:
    """Stops look-ups until it is let go."""

    def __init__(self) -> None:
        self._free = threading.Event()
        self.entered = threading.Semaphore(0)

    def __call__(self) -> None:
        self.entered.release()
        assert self._free.wait(10.0)

    def let_go(self) -> None:
        """Everybody goes on."""
        self._free.set()
