"""Whose events are computed with whose: who comes while calls are under way, those that fail, rooms that differ, one
that hangs."""

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
from rankd.engine.cuda import events_together
from rankd.engine.cuda.cuda_backend import CudaBackend
from rankd.engine.cuda.events_together import EventsTogether, NewEvents, sizes_of
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
            def compute_all(self, users: Sequence[NewEvents]) -> list[Mapping[str, Array]]:
                names = tuple(int(one.events["name"][0]) for one in users)
                calls.append(names)
                assert go_on.wait(20)
                if names in failing:
                    raise EngineFailure(f"{names} cannot be encoded")
                self.made = [PlacedState((name,), ([name],)) for name in names]
                return [{"name": one.events["name"]} for one in users]

            def made_last(self) -> list[PlacedState]:
                return self.made

        return One()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@contextmanager
def asking(together: EventsTogether, executors: Executors) -> Iterator[Callable[..., Future[Any]]]:
    """`ask(name, room)` is on its way, in a thread of its own, and waits if it has to, before it returns."""
    with ThreadPoolExecutor(8) as threads:

        def ask(name: int, room: int = 256, known: UserState | None = None) -> Future[Any]:
            waiting, calls = len(waiting_in(together)), len(executors.calls)
            asked = threads.submit(together.compute, executors.one(), NewEvents(history(name, room), known=known))
            until(lambda: len(waiting_in(together)) > waiting or len(executors.calls) > calls)
            return asked

        yield ask
        executors.go_on.set()


def waiting_in(together: EventsTogether) -> list[Any]:
    return [*together._histories.waiting, *together._extensions.waiting]


def check(asked: Future[Any], name: int) -> None:
    state, placed = asked.result(20)
    assert state["name"].tolist() == [name]
    assert placed.pages == ([name],)


def test_how_many_go_together_depends_on_the_room() -> None:
    assert [sizes_of(room) for room in (16, 1024, 1025, 2048, 2049)] == [(1, 2, 4), (1, 2, 4), (1, 2), (1, 2), (1,)]


def test_who_waits_goes_together_with_others_of_the_room() -> None:
    together, executors = EventsTogether(1, 8), Executors()
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
    together, executors = EventsTogether(2, 2), Executors()
    with asking(together, executors) as ask:
        asked = [ask(name) for name in range(6)]
        assert sorted(executors.calls) == [(0,), (1,)]
        executors.go_on.set()
        for name, one in enumerate(asked):
            check(one, name)
    assert max(map(len, executors.calls)) == 2


def test_extensions_have_a_line_of_their_own() -> None:
    """They begin beside a history that is being encoded, and go together; never with one."""
    together, executors, known = EventsTogether(1, 8), Executors(), UserState({}, ())
    with asking(together, executors) as ask:
        asked = [ask(0, 8), *(ask(name, 8, known) for name in range(1, 4)), ask(4, 8)]
        assert executors.calls == [(0,), (1,)]
        executors.go_on.set()
        for name, one in enumerate(asked):
            check(one, name)
    assert sorted(tuple(sorted(call)) for call in executors.calls) == [(0,), (1,), (2, 3), (4,)]


def test_what_fails_together_is_tried_alone() -> None:
    failing = [*((a, b) for a in range(1, 3) for b in range(1, 3) if a != b), (2,)]
    together, executors = EventsTogether(1, 8), Executors(failing)
    with asking(together, executors) as ask:
        asked = [ask(name) for name in range(3)]
        executors.go_on.set()
        check(asked[0], 0)
        check(asked[1], 1)
        with pytest.raises(EngineFailure, match=r"\(2,\) cannot be encoded"):
            asked[2].result(20)
    assert {(1,), (2,)} < set(executors.calls)
    assert together._histories.running == 0
    assert waiting_in(together) == []


def test_nobody_waits_for_ever_for_a_call_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    together, executors = EventsTogether(1, 8), Executors()
    with asking(together, executors) as ask:
        hanging = ask(0)
        monkeypatch.setattr(events_together, "WAIT_SECONDS", 0.05)
        with pytest.raises(EngineFailure, match=r"1 calls have been computing .* does the GPU hang"):
            together.compute(executors.one(), NewEvents(history(1)))
        assert waiting_in(together) == []
        executors.go_on.set()  # it comes back after all
        check(hanging, 0)
        check(ask(2), 2)


def test_who_was_computed_together_got_what_is_theirs() -> None:
    """Through real executors, histories and then what comes after them: the scores of each user, and what stays in the
    pool under each mark."""
    schema = schema_of(1)
    _, model = model_over(schema, OPTIONS | {"layers": 1}, torch.float32)
    device = InterpretedDevice()
    backend = CudaBackend(model, lambda: device, EngineConfig("cuda", executors=1, gpu_state_mib=1, calls_in_flight=3))
    executors = [backend.executor() for _ in range(3)]
    wholes = [history_of(schema, 18, [length], length) for length in (18, 5, 11)]
    known = [16, 3, 10]
    histories = [part_of(whole, 0, length, 18) for whole, length in zip(wholes, known, strict=True)]
    news = [part_of(whole, length, 8, 8) for whole, length in zip(wholes, known, strict=True)]
    candidates = candidates_of(schema, 5)
    for executor in executors:
        nobody = UserState(executor.encode(history_of(schema, 18, [0])), (0,))
        executor.extend(nobody, history_of(schema, 8, [0]))
    recorded = device.counts["recorded"]
    single = CudaBackend(model, InterpretedDevice, EngineConfig("cuda", executors=1, gpu_state_mib=1)).executor()
    expected = [
        [
            single.score([UserState(single.encode(one), tuple(one["history_length"][0].tolist()))], candidates)
            for one in each
        ]
        for each in (histories, wholes)
    ]
    sizes: list[tuple[bool, int]] = []
    for executor in executors:
        inner = executor.compute_all

        def noted(users: Sequence[NewEvents], inner: Any = inner) -> Any:
            extends = users[0].known is not None
            sizes.append((extends, len(users)))
            until(lambda: sum(one == extends for one, _ in sizes) > 1 or len(waiting_in(backend._together)) == 2)
            return inner(users)  # the first one has let others come

        executor.compute_all = noted  # type: ignore[method-assign]

    def lent(arrays: Mapping[str, Array], length: int, mark: bytes) -> UserState:
        """What is in the pool is read there, and nothing of the rest."""
        garbage = {name: array if name == "lengths" else array * 0 for name, array in arrays.items()}
        return UserState(garbage, (length,), mark)

    first = threading.Barrier(3)

    def asked(number: int) -> None:
        executor, mark = executors[number], b"user %d" % number
        arrays = executor.encode(histories[number])
        executor.keep(mark)
        state = lent(arrays, known[number], mark)
        near(executor.score([state], candidates), expected[0][number], 1e-6)
        first.wait(20)
        added = executor.extend(state, news[number])
        executor.keep(mark + b", later")
        whole = known[number] + int(news[number]["history_length"][0, 0])
        assert added["lengths"].tolist() == [[whole]]
        later = lent({**arrays, "lengths": added["lengths"]}, whole, mark + b", later")
        near(executor.score([later], candidates), expected[1][number], 1e-6)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(asked, range(3)))
    assert sorted(sizes) == [(False, 1), (False, 2), (True, 1), (True, 2)]
    scored = len({id(one._scoring) for one in executors})
    assert device.counts["recorded"] - recorded <= scored  # the buckets of calls for several were there already


def part_of(history: Mapping[str, Array], first: int, most: int, room: int) -> dict[str, Array]:
    """Events from the first one on, `most` of them if there are so many, in a room."""
    count = min(most, int(history["history_length"][0, 0]) - first)
    made = {}
    for name, array in history.items():
        if name == "history_length":
            made[name] = np.full_like(array, count)
            continue
        made[name] = np.zeros((*array.shape[:2], room, *array.shape[3:]), array.dtype)
        made[name][:, :, :count] = array[:, :, first : first + count]
    return made
