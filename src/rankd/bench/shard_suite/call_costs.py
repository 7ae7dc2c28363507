"""What a call of a shard takes on both of its sides: framed TCP between two processes of this machine.

In: a folder for tables. Out: CallCosts. Tables are small enough for caches, and what looking up takes is measured in
this process and taken off, so that what is left is routing, frames, sockets and joining. Shapes:

    one      a sample with one id: what a call itself takes
    ids      many ids, a small answer
    split    the same in a table of two parts on two shards
    answer   few ids, a large answer

All shapes in turn, several times, and of each the median: what else this process does (threads of other libraries that
spin after they have computed) is counted as the client's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from rankd.bench.placement import cpu_seconds
from rankd.bench.shard_suite.placed_server import ShardServerProcess
from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.local_tables import LocalTables
from rankd.embeddings.table_file import open_table
from rankd.embeddings.table_spec import TablePart, TableSpec
from rankd.embeddings.table_writing import write_table
from rankd.malloc import keep_freed
from rankd.plan.declaration import Declaration
from rankd.plan.plan_file import read_plan, write_plan
from rankd.plan.table_plan import MemoryLimits, Plan, Shard, Strategy
from rankd.serve.memory import keep_loaded
from rankd.shards.planned_shards import layout_of
from rankd.shards.pool_frames import NARROW_BYTES, VALUE_BYTES
from rankd.shards.shard_config import ShardClientConfig, SumFormat
from rankd.shards.sharded_pooling import ShardedPooling

ROWS, NARROW, WIDE = 1000, 8, 512
SAMPLES, BAG = 64, 512
START_SECONDS = 30.0
WARM_CALLS = 20
ROUNDS = 5
PATIENT_MS = 10_000.0
"""A call that a busy machine delays is measured late, and fails nothing."""
IDS, SPLIT, ANSWER = (
    TableSpec("ids", ROWS, NARROW),
    TableSpec("split", ROWS, NARROW),
    TableSpec("answer", ROWS, WIDE),
)


@dataclass(frozen=True, slots=True)
class CallCosts:
    """Microseconds, by the names of `CostModel`; `call_wall_us` is the round trip of the smallest call."""

    call_us: float
    id_us: float
    split_id_us: float
    answer_byte_us: float
    shard_call_us: float
    shard_id_us: float
    shard_answer_byte_us: float
    sum_bytes: int
    loopback_us: float
    call_wall_us: float


@dataclass(frozen=True, slots=True)
class Shape:
    """What is asked, and of what size the answer is."""

    asked: JaggedIds
    answer_bytes: int


@dataclass(frozen=True, slots=True)
class Sides:
    """Microseconds a call of a shape: CPU of the client, CPU of all shards without look-ups, and wall time."""

    client_us: float
    shards_us: float
    wall_us: float


def call_costs(folder: Path, seconds: float, sums: SumFormat) -> CallCosts:
    """Measure each shape for so many seconds in all, tables and two shards in `folder` meanwhile. From then on this
    process keeps what it frees, and never collects what is there now, as servers do.

    Raises:
        Unavailable: a shard did not start.
    """
    keep_freed()
    keep_loaded()
    with ExitStack() as running:
        specs = (IDS, SPLIT, ANSWER)
        block = np.random.default_rng(0).random((ROWS, WIDE), np.float32)
        paths = [write_table(folder, spec, [np.ascontiguousarray(block[:, : spec.dim])]) for spec in specs]
        tables = running.enter_context(LocalTables([open_table(path) for path in paths]))
        plan = folder / "calls.json"
        halves = tuple(TablePart(SPLIT.name, 2, half) for half in (0, 1))
        shards = (Shard((TablePart(IDS.name), halves[0], TablePart(ANSWER.name))), Shard((halves[1],)))
        limits = MemoryLimits(replicate_bytes=0)
        write_plan(plan, Declaration("calls", specs), Plan(Strategy.LOAD_BALANCED, specs, shards, (), (), limits))
        processes = [running.enter_context(ShardServerProcess(plan, folder, number)) for number in range(len(shards))]
        addresses = [[f"{process.host}:{process.port}"] for process in processes]
        config = ShardClientConfig(timeout_ms=PATIENT_MS, sums=sums)
        asking = ShardedPooling(layout_of(read_plan(plan), addresses), config)
        running.callback(asking.close)
        asking.start()
        asking.wait_up(START_SECONDS)
        pids = [process.pid for process in processes]
        sum_bytes = NARROW_BYTES if sums is SumFormat.BF16 else VALUE_BYTES
        asked = shapes(sum_bytes)
        rounds = [
            {name: _measured(asking, tables, pids, shape, seconds / ROUNDS) for name, shape in asked.items()}
            for _ in range(ROUNDS)
        ]
        return fitted({name: medians([one[name] for one in rounds]) for name in asked}, sum_bytes)


def shapes(sum_bytes: int = VALUE_BYTES) -> dict[str, Shape]:
    """The shapes by their names; no two samples have the same ids, which would be sent once for both."""
    random = np.random.default_rng(0)

    def shape(spec: TableSpec, samples: int, bag: int) -> Shape:
        offsets = np.arange(0, samples * bag + 1, bag, dtype=np.int64)
        asked = JaggedIds((spec.name,), offsets, random.integers(0, ROWS, samples * bag))
        return Shape(asked, sum_bytes * samples * spec.dim)

    return {
        "one": shape(IDS, 1, 1),
        "ids": shape(IDS, SAMPLES, BAG),
        "split": shape(SPLIT, SAMPLES, BAG),
        "answer": shape(ANSWER, 8 * SAMPLES, 1),
    }


def medians(rounds: Sequence[Sides]) -> Sides:
    """Of each side by itself."""
    return Sides(*(statistics.median(side) for side in zip(*map(astuple, rounds), strict=True)))


def fitted(sides: Mapping[str, Sides], sum_bytes: int = VALUE_BYTES) -> CallCosts:
    """Costs of which the measured shapes, by their names, are made; none is below nothing."""
    given = shapes(sum_bytes)
    one, ids, split, answer = (sides[name] for name in ("one", "ids", "split", "answer"))
    num_ids = len(given["ids"].asked.ids)
    answer_ids, answer_bytes = len(given["answer"].asked.ids), given["answer"].answer_bytes

    def parts(call_us: float, ids_us: float, answer_us: float) -> tuple[float, float]:
        """What an id takes, and a byte of an answer."""
        id_us = max(ids_us - call_us, 0.0) / num_ids
        return id_us, max(answer_us - call_us - answer_ids * id_us, 0.0) / answer_bytes

    id_us, answer_byte_us = parts(one.client_us, ids.client_us, answer.client_us)
    shard_id_us, shard_answer_byte_us = parts(one.shards_us, ids.shards_us, answer.shards_us)
    return CallCosts(
        call_us=one.client_us,
        id_us=id_us,
        split_id_us=max(split.client_us - 2 * one.client_us - num_ids * id_us, 0.0) / num_ids,
        answer_byte_us=answer_byte_us,
        shard_call_us=one.shards_us,
        shard_id_us=shard_id_us,
        shard_answer_byte_us=shard_answer_byte_us,
        sum_bytes=sum_bytes,
        loopback_us=max(one.wall_us - one.client_us - one.shards_us, 0.0) / 2,
        call_wall_us=one.wall_us,
    )


def _measured(asking: ShardedPooling, tables: LocalTables, pids: list[int], shape: Shape, seconds: float) -> Sides:
    for _ in range(WARM_CALLS):
        asking.pool(shape.asked)
    began = time.thread_time()
    calls = _made(lambda: tables.pool(shape.asked), seconds / 4)
    looked_up_us = (time.thread_time() - began) * 1e6 / calls
    before, own, began = sum(map(cpu_seconds, pids)), time.process_time(), time.perf_counter()
    calls = _made(lambda: asking.pool(shape.asked), seconds)
    wall_us = (time.perf_counter() - began) * 1e6 / calls
    client_us = (time.process_time() - own) * 1e6 / calls
    shards_us = (sum(map(cpu_seconds, pids)) - before) * 1e6 / calls
    return Sides(client_us, max(shards_us - looked_up_us, 0.0), wall_us - looked_up_us)


def _made(call: Callable[[], object], seconds: float) -> int:
    """How many calls were made, one after the other, in so long; one at least."""
    calls, until = 1, time.perf_counter() + seconds
    call()
    while time.perf_counter() < until:
        call()
        calls += 1
    return calls
