"""A rankd server with the shards of a plan around it, each a process of its own.

In: a model repository, a plan's file (none: all tables in the server). Out: a server to be loaded, and what each
process used of the machine.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rankd.bench.placement import cpu_seconds
from rankd.bench.served_model import ServedModel
from rankd.bench.server_process import ServerProcess
from rankd.embeddings.table_format import FOLDER
from rankd.plan.plan_file import read_plan
from rankd.shards.planned_shards import layout_of
from rankd.shards.shard_config import ShardClientConfig
from rankd.shards.sharded_pooling import ShardedPooling

STATS_SECONDS = 5.0
TIMEOUT_MS = 5000


class ShardServerProcess(ServerProcess):
    """`rankd shard serve` with one worker, on a free port."""

    def __init__(self, plan: Path, tables: Path, number: int) -> None:
        super().__init__(("rankd", "shard", "serve", str(plan), str(tables), "--shard", str(number), "--workers", "1"))

    def is_ready(self) -> bool:
        """Whether it has said where it listens."""
        found = re.search(r"shard: plan \S+ at ([\d.]+):(\d+)", self.log_text())
        if found is None:
            return False
        self.host, self.port = found[1], int(found[2])
        return True


@dataclass(frozen=True, slots=True)
class ShardWork:
    """What all shards together have done: calls, and milliseconds in which they waited for a worker and were served;
    and the processor seconds of the server and of the shards."""

    calls: int = 0
    queue_ms: float = 0.0
    service_ms: float = 0.0
    server_cpu_s: float = 0.0
    shards_cpu_s: float = 0.0


class PlacedServer:
    """Use it as a context manager. `server` is the rankd server."""

    def __init__(self, root: Path, version: Path, plan: Path | None) -> None:
        self._root, self._tables, self._plan = root, version / FOLDER, plan
        self._running = ExitStack()
        self._shards: list[ShardServerProcess] = []
        self._asking: ShardedPooling | None = None
        self.server: ServedModel

    def __enter__(self) -> Self:
        variables = {}
        try:
            if self._plan is not None:
                file = read_plan(self._plan)
                for number in range(len(file.plan.shards)):
                    process = ShardServerProcess(self._plan, self._tables, number)
                    self._shards.append(self._running.enter_context(process))
                addresses = [f"{shard.host}:{shard.port}" for shard in self._shards]
                layout = layout_of(file, [[address] for address in addresses])
                self._asking = ShardedPooling(layout, ShardClientConfig())
                self._asking.start()
                self._running.callback(self._asking.close)
                self._asking.wait_up(STATS_SECONDS)
                variables = {
                    "RANKD_TABLES__PLAN": str(self._plan),
                    "RANKD_TABLES__SHARDS": ",".join(addresses),
                    "RANKD_TABLES__CLIENT__TIMEOUT_MS": str(TIMEOUT_MS),
                }
            served = ServedModel(self._root, ("rankd", "serve", "--store", "memory:"), variables)
            self.server = self._running.enter_context(served)
        except BaseException:
            self._running.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def work(self) -> ShardWork:
        """What was done since the start."""
        stats = self._asking.stats(STATS_SECONDS).values() if self._asking is not None else ()
        return ShardWork(
            calls=sum(sum(one.requests.values()) for one in stats),
            queue_ms=sum(one.queue_ms for one in stats),
            service_ms=sum(one.service_ms for one in stats),
            server_cpu_s=cpu_seconds(self.server.pid),
            shards_cpu_s=sum(cpu_seconds(shard.pid) for shard in self._shards),
        )
