"""Suite `tables`: pooled look-up of ours, torch and FBGEMM in turn, over the same rows and ids.

In: options. Out: a Report. The sums are compared first. Then in each round every contestant answers all requests once,
after a pause in which the threads of the one before it come to rest. They share a process, as the tables of each would
be too much memory for several.

Beside it: what the memory gives to random cache lines and to copying, and the share of that which the rows of a call
take. A row's lines lie side by side, and small tables in caches: it may be more than what random lines get.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rankd.bench.report import Neighbours, Report, Row, commit, machine
from rankd.bench.table_suite.dlrm_tables import IDS, dlrm_specs, drawn_requests, drawn_rows
from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.local_tables import LocalTables
from rankd.embeddings.table_file import Table, open_table, pages_for
from rankd.embeddings.table_spec import TableSpec, TableStorage
from rankd.embeddings.table_writing import write_table
from rankd.errors import EngineFailure, MissingExtra
from rankd.types import Float32Array

REQUESTS = 8
"""Different ones, so that a request's rows are not in the caches from the round before."""
PAUSE_S = 0.02
SEED = 1
BOUNDS = {TableStorage.FP32: 1e-5, TableStorage.FP16: 2e-3, TableStorage.INT8: 2e-3, TableStorage.INT4: 2e-3}
"""Largest difference of a sum, as a share of the largest sum: torch's fp16 sums are fp16, peers' scales may be."""
Advance = Callable[[int, int, str], None]
Run = Callable[[int], object]
"""Answers a request by its number."""


@dataclass(frozen=True, slots=True)
class TableOptions:
    """Storages and threads, one after the other; the tables have 1/smaller of MLPerf's rows, of `dim` numbers."""

    storages: tuple[TableStorage, ...] = tuple(TableStorage)
    threads: tuple[int, ...] = (1, 2)
    samples: int = 256
    smaller: int = 100
    dim: int = 128
    runs: int = 7


def run_tables(options: TableOptions, advance: Advance) -> Report:
    """Run the suite.

    Raises:
        MissingExtra: torch is not installed.
        EngineFailure: a contestant's sums differ.
    """
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        raise MissingExtra("rankd bench tables", "train")
    surroundings, neighbours = machine(), Neighbours()
    results: list[Row] = []
    parity: dict[str, float] = {}
    size_bytes = sum(spec.size_bytes for spec in dlrm_specs(TableStorage.FP32, options.smaller, options.dim))
    speeds = {threads: _memory_speed(threads, size_bytes) for threads in options.threads}
    for done, storage in enumerate(options.storages):
        advance(done, len(options.storages), storage.value)
        rows, differences = _one_storage(storage, options, speeds)
        results += rows
        parity |= {f"{name} {storage.value}": difference for name, difference in differences.items()}
    advance(len(options.storages), len(options.storages), "done")
    results += [
        {"contestant": "memory", "table": f"memory, {_threads(threads)}"} | speed for threads, speed in speeds.items()
    ]
    surroundings["others_cpu_share"] = neighbours.share()
    return Report("tables", _about(options), surroundings, commit(), parity, results, _ratios(results))


def _about(options: TableOptions) -> dict[str, Any]:
    ids = sum(IDS)
    return {
        "name": "dlrm",
        "use": f"MLPerf's 26 tables of width {options.dim} with 1/{options.smaller} of their rows, {ids} uniform ids a "
        "sample",
        "served": {"samples": options.samples, "ids": ids * options.samples},
        "flops": {"sums": float(options.samples * ids * options.dim)},
        "runs": options.runs,
    }


def _threads(count: int) -> str:
    return f"{count} thread" + "s" * (count > 1)


def _memory_speed(threads: int, size_bytes: int) -> dict[str, float]:
    from rankd.bench.table_suite.memory_kernels import memory_speed  # compiles

    return memory_speed(threads, size_bytes)


def _one_storage(
    storage: TableStorage, options: TableOptions, speeds: dict[int, dict[str, float]]
) -> tuple[list[Row], dict[str, float]]:
    """Rows of a storage, and the largest differences of the peers' sums from ours, as shares of the largest sum."""
    import torch

    from rankd.bench.table_suite.torch_lookups import peer_calls

    specs = dlrm_specs(storage, options.smaller, options.dim)
    asked = drawn_requests(specs, options.samples, REQUESTS, SEED)
    rows: list[Row] = []
    with TemporaryDirectory(prefix="rankd-bench-") as folder:
        pages = pages_for(sum(spec.size_bytes for spec in specs))
        paths = [write_table(Path(folder), spec, drawn_rows(spec, SEED)) for spec in specs]
        tables = [open_table(path, pages=pages) for path in paths]
        peers = peer_calls(tables, asked)
        differences = _parity(storage, tables, asked, peers)
        before = torch.get_num_threads()
        for threads in options.threads:
            torch.set_num_threads(threads)
            with LocalTables(tables, threads) as ours:
                runs: dict[str, Run] = {"rankd": _ours(ours, asked), **peers}
                taken = _in_turn(runs, options.runs)
            rows += [_row(name, storage, threads, asked, specs, one, speeds[threads]) for name, one in taken.items()]
        torch.set_num_threads(before)
    return rows, differences


def _ours(tables: LocalTables, asked: Sequence[JaggedIds]) -> Run:
    return lambda number: tables.pool(asked[number])


def _parity(
    storage: TableStorage, tables: Sequence[Table], asked: Sequence[JaggedIds], peers: dict[str, Any]
) -> dict[str, float]:
    differences = dict.fromkeys(peers, 0.0)
    ours = LocalTables(tables)
    for number, one in enumerate(asked):
        sums = ours.pool(one)
        for name, call in peers.items():
            theirs: Float32Array = np.concatenate([block.float().numpy() for block in call(number)], axis=1)
            differences[name] = max(differences[name], float(np.abs(theirs - sums).max() / np.abs(sums).max()))
    for name, difference in differences.items():
        if not difference <= BOUNDS[storage]:
            raise EngineFailure(
                f"the sums of {name} in {storage.value} differ from ours by {difference:.2g} of the largest one, and "
                f"{BOUNDS[storage]:.2g} is allowed, so nothing is measured"
            )
    return differences


def _in_turn(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of all calls of each contestant; who begins changes from round to round."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for one in range(rounds):
        first = one % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(PAUSE_S)
            runs[name](REQUESTS - 1)  # wakes its threads
            for number in range(REQUESTS - 1):
                started = time.perf_counter()
                runs[name](number)
                taken[name].append(time.perf_counter() - started)
    return taken


def _row(
    name: str,
    storage: TableStorage,
    threads: int,
    asked: Sequence[JaggedIds],
    specs: Sequence[TableSpec],
    taken: Sequence[float],
    speed: dict[str, float],
) -> Row:
    median_s, samples = statistics.median(taken), asked[0].num_samples
    read_bytes = sum(samples * ids * spec.row_bytes for spec, ids in zip(specs, IDS, strict=True))
    return {
        "contestant": name,
        "table": f"{storage.value}, {_threads(threads)}",
        "storage": storage.value,
        "threads": threads,
        "p50_ms": median_s * 1e3,
        "throughput": len(asked[0].ids) / median_s,
        "bytes_per_s": read_bytes / median_s,
        "share_of_random": read_bytes / median_s / speed["random_bytes_per_s"],
        "share_of_copy": read_bytes / median_s / speed["copy_bytes_per_s"],
    }


def _ratios(results: Sequence[Row]) -> dict[str, float]:
    """Rows a second of ours over those of the fastest peer."""
    found = [
        (row["storage"], row["threads"], row["contestant"], row["throughput"]) for row in results if "storage" in row
    ]
    ratios = {}
    for storage, threads in dict.fromkeys(one[:2] for one in found):
        speeds = {name: speed for kind, count, name, speed in found if (kind, count) == (storage, threads)}
        ours = speeds.pop("rankd")
        ratios[f"lookup_vs_best_peer_{storage}_{threads}"] = ours / max(speeds.values())
    return ratios
