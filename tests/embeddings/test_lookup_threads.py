"""Helpers of a look-up: asleep or awake, shared by callers, closed; no span is lost and none is summed twice."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from rankd.embeddings.local_tables import LocalTables
from rankd.embeddings.lookup_threads import LookupThreads
from rankd.embeddings.shared_lookup_kernels import ASLEEP, STATE
from rankd.embeddings.table_layout import layout
from rankd.embeddings.table_spec import TableStorage
from rankd.types import Float32Array, Int64Array
from tests.features.stores.redis_server import eventually

from .made_tables import asked_of, made_table

TABLE = made_table("t", 60, 33, TableStorage.INT8)
ASKED = asked_of(("t",), [[row % 60 for row in range(bag, bag + bag % 5)] for bag in range(400)])
WHOLE = LocalTables([TABLE]).pool(ASKED)
LAYOUTS = np.asarray([layout(TABLE)])


def summed(threads: LookupThreads, cuts: Int64Array, ids: Int64Array = ASKED.ids) -> tuple[int, Float32Array]:
    out = np.full((400, 33), np.float32(7))
    return threads.sum(LAYOUTS, ASKED.offsets, ids, cuts, out), out


def asleep(threads: LookupThreads) -> bool:
    return all(helper._cells[STATE] == ASLEEP for helper in threads._helpers)


def test_every_span_is_summed_whether_helpers_sleep_or_not() -> None:
    random = np.random.default_rng(0)
    threads = LookupThreads(2)
    for number in range(300):
        cuts = np.sort(np.concatenate([[0, 400], random.integers(0, 401, number % 40)]))
        found, out = summed(threads, cuts)
        assert found == -1
        assert np.array_equal(out, WHOLE)
        if number % 50 == 0:
            eventually(lambda: asleep(threads), "helpers that have nothing to do sleep")
        elif number % 7 == 0:
            time.sleep(random.random() * 3e-4)  # about as long as they stay awake
    threads.close()


def test_the_first_wrong_id_is_found_by_whoever_took_its_span() -> None:
    threads, cuts = LookupThreads(3), np.arange(0, 401, 10)
    for place in (3, 400, len(ASKED.ids) - 1):
        ids = ASKED.ids.copy()
        ids[[place, -1]] = 60
        assert summed(threads, cuts, ids)[0] == place
    threads.close()


def test_callers_share_helpers() -> None:
    threads, wrong = LookupThreads(2), list[int]()

    def look_up() -> None:
        for _ in range(200):
            found, out = summed(threads, np.arange(0, 401, 8))
            if found != -1 or not np.array_equal(out, WHOLE):
                wrong.append(found)

    callers = [threading.Thread(target=look_up) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    threads.close()
    assert not wrong


@pytest.mark.parametrize("used", [False, True])
def test_closing_ends_the_threads_asleep_or_awake(used: bool) -> None:
    for _ in range(30):
        threads = LookupThreads(2)
        if used:
            summed(threads, np.arange(0, 401, 8))
        threads.close()
        assert not any(helper._thread.is_alive() for helper in threads._helpers)
