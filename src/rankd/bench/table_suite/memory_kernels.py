"""What the machine's memory gives: random cache lines, and copying. In: large arrays. Out: bytes a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rankd.bench.table_suite.huge_memory import huge_memory
from rankd.embeddings.row_sums import ask_to_read
from rankd.embeddings.table_layout import LINE_BYTES
from rankd.machine_code import kernel, read, types
from rankd.types import Float32Array, Int64Array

AHEAD = 32
TRIALS = 5
_LINE_NUMBERS = LINE_BYTES // 4


@kernel(types.float32(read(types.float32, 1, "C"), read(types.int64, 1, "C")))
def read_lines(numbers: Float32Array, lines: Int64Array) -> float:
    """Read one number of each line, which was asked for AHEAD lines before; returns their sum."""
    total = np.float32(0.0)
    last = lines.shape[0] - 1
    for place in range(lines.shape[0]):
        ask_to_read(numbers.ctypes.data + lines[min(place + AHEAD, last)] * LINE_BYTES)
        total += numbers[lines[place] * _LINE_NUMBERS]
    return float(total)


def memory_speed(threads: int, size_bytes: int) -> dict[str, float]:
    """Bytes a second of so many threads, the best of TRIALS: random lines of `size_bytes` of memory, and a copy of half
    of it into the other (bytes read and written)."""
    numbers = huge_memory(size_bytes).view(np.float32)
    numbers[:] = 1.0
    lines = numbers.nbytes // LINE_BYTES
    wanted = [np.random.default_rng(seed).integers(0, lines, max(lines // 8, 1)) for seed in range(threads)]
    half = len(numbers) // 2 // threads
    pieces = [slice(thread * half, (thread + 1) * half) for thread in range(threads)]
    there, here = numbers[: half * threads], numbers[half * threads : 2 * half * threads]
    with ThreadPoolExecutor(threads) as workers:
        random_s = _best_s(lambda: list(workers.map(lambda one: read_lines(numbers, one), wanted)))
        copy_s = _best_s(lambda: list(workers.map(lambda one: np.copyto(here[one], there[one]), pieces)))
    read_bytes = sum(len(one) for one in wanted) * LINE_BYTES
    return {"random_bytes_per_s": read_bytes / random_s, "copy_bytes_per_s": 2 * here.nbytes / copy_s}


def _best_s(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(TRIALS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)
