"""Who is encoded with whom: who comes while others encode, calls that fail, rooms that differ, one that hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from rankd.engine.backend import EngineConfig
from rankd.engine.cuda import encoded_together
from rankd.engine.cuda.cuda_backend import CudaBackend
from rankd.engine.cuda.encoded_together import EncodedTogether, sizes_of
from rankd.engine.cuda.state_pool import PlacedState
from rankd.errors import EngineFailure
from rankd.types import Array, UserState
from tests.engine.cuda.interpreted_device import InterpretedDevice
from tests.engine.cuda.test_cuda_executor import OPTIONS, model_over, near
from tests.engine.test_native_climber import candidates_of, history_of, schema_of

Histories = Sequence[Mapping[str, Array]]


def history(name: int, room: int = 256) -> dict[str, Array]:
    return {"history_time": np.zeros((1, 1, room), np.int32), "name": np.array([name])}


class Executors:
    """What a model's executors do: they note who is in a call, stop in it until they may go on, and fail for some."""

    def __init__(self, failing: Sequence[tuple[int, ...]] = ()) -> None:
        self.calls: list[tuple[int, ...]] = []
        self.go_on = threading.Event()
        self._failing = failing

    def one(self) -> Any:
        calls, go_on, failing = self.calls, self.go_on, self._failing

        class One:
            def encode_all(self, histories: Histories, into: Sequence[Any]) -> list[Mapping[str, Array]]:
                names = tuple(int(one["name"][0]) for one in histories)
                calls.append(names)
                assert go_on.wait(20)
                if names in failing:
                    raise EngineFailure(f"{names} cannot be encoded")
                self.made = [PlacedState((name,), ([name],)) for name in names]
                return [{"name": one["name"]} for one in histories]

            def made_last(self) -> list[PlacedState]:
                return self.made

        return One()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@contextmanager
def asking(together: EncodedTogether, executors: Executors) -> Iterator[Callable[..., Future[Any]]]:
    """`ask(name, room)` is on its way, in a thread of its own, and waits if it has to, before it returns."""
    with ThreadPoolExecutor(8) as threads:

        def ask(name: int, room: int = 256) -> Future[Any]:
            waiting, calls = len(together._waiting), len(executors.calls)
            asked = threads.submit(together.encode, executors.one(), history(name, room), None)
            until(lambda: len(together._waiting) > waiting or len(executors.calls) > calls)
            return asked

        yield ask
        executors.go_on.set()


def check(asked: Future[Any], name: int) -> None:
    state, placed = asked.result(20)
    assert state["name"].tolist() == [name]
    assert placed.pages == ([name],)


def test_how_many_go_together_depends_on_the_room() -> None:
    assert [sizes_of(room) for room in (16, 1024, 1025, 2048, 2049)] == [(1, 2, 4), (1, 2, 4), (1, 2), (1, 2), (1,)]


def test_who_waits_goes_together_with_others_of_the_room() -> None:
    together, executors = EncodedTogether(1, 8), Executors()
    with asking(together, executors) as ask:
        rooms = (256, 256, 512, 256, 256, 256, 256)
        asked = [ask(name, room) for name, room in enumerate(rooms)]
        assert executors.calls == [(0,)]
        executors.go_on.set()
        for name, one in enumerate(asked):
            check(one, name)
    assert sorted(len(call) for call in executors.calls if 2 not in call)[-1] == 4
    assert (2,) in executors.calls
    assert sorted(name for call in executors.calls for name in call) == list(range(7))


def test_as_many_encode_at_once_as_may_and_no_more_users_go_together_than_there_are_pages() -> None:
    together, executors = EncodedTogether(2, 2), Executors()
    with asking(together, executors) as ask:
        asked = [ask(name) for name in range(6)]
        assert sorted(executors.calls) == [(0,), (1,)]
        executors.go_on.set()
        for name, one in enumerate(asked):
            check(one, name)
    assert max(map(len, executors.calls)) == 2


def test_what_fails_together_is_tried_alone() -> None:
    failing = [*((a, b) for a in range(1, 3) for b in range(1, 3) if a != b), (2,)]
    together, executors = EncodedTogether(1, 8), Executors(failing)
    with asking(together, executors) as ask:
        asked = [ask(name) for name in range(3)]
        executors.go_on.set()
        check(asked[0], 0)
        check(asked[1], 1)
        with pytest.raises(EngineFailure, match=r"\(2,\) cannot be encoded"):
            asked[2].result(20)
    assert {(1,), (2,)} < set(executors.calls)
    assert together._running == 0
    assert together._waiting == []


def test_nobody_waits_for_ever_for_a_call_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    together, executors = EncodedTogether(1, 8), Executors()
    with asking(together, executors) as ask:
        hanging = ask(0)
        monkeypatch.setattr(encoded_together, "WAIT_SECONDS", 0.05)
        with pytest.raises(EngineFailure, match=r"1 calls have been encoding .* does the GPU hang"):
            together.encode(executors.one(), history(1), None)
        assert together._waiting == []
        executors.go_on.set()  # it comes back after all
        check(hanging, 0)
        check(ask(2), 2)


def test_histories_that_were_encoded_together_are_whose_they_are() -> None:
    """Through real executors: the scores of each user, and what stays in the pool under each mark."""
    schema = schema_of(1)
    _, model = model_over(schema, OPTIONS | {"layers": 1}, torch.float32)
    device = InterpretedDevice()
    backend = CudaBackend(model, lambda: device, EngineConfig("cuda", executors=1, gpu_state_mib=1, calls_in_flight=3))
    executors = [backend.executor() for _ in range(3)]
    histories = [history_of(schema, 18, [length], length) for length in (18, 3, 11)]
    candidates = candidates_of(schema, 5)
    for executor in executors:
        executor.encode(history_of(schema, 18, [0]))
    recorded = device.counts["recorded"]
    single = CudaBackend(model, InterpretedDevice, EngineConfig("cuda", executors=1, gpu_state_mib=1)).executor()
    expected = [
        single.score([UserState(single.encode(one), tuple(one["history_length"][0].tolist()))], candidates)
        for one in histories
    ]
    sizes: list[int] = []
    for executor in executors:
        inner = executor.encode_all

        def noted(some: Histories, into: Sequence[Any], inner: Any = inner) -> Any:
            sizes.append(len(some))
            until(lambda: len(sizes) > 1 or len(backend._together._waiting) == 2)  # the first one lets others come
            return inner(some, into)

        executor.encode_all = noted  # type: ignore[method-assign, assignment]

    def asked(number: int) -> None:
        executor, mark = executors[number], b"user %d" % number
        arrays = executor.encode(histories[number])
        executor.keep(mark)
        garbage = {name: array if name == "lengths" else array * 0 for name, array in arrays.items()}
        state = UserState(garbage, tuple(histories[number]["history_length"][0].tolist()), mark)
        near(executor.score([state], candidates), expected[number], 1e-6)  # of what is in the pool

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(asked, range(3)))
    assert sorted(sizes) == [1, 2]
    scored = len({id(one._scoring) for one in executors})
    assert device.counts["recorded"] - recorded <= scored  # the buckets of calls for several were there already
