"""States that stay on the GPU, on CPU tensors: found without their arrays, sent where they are not, grown in place."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from rankd.engine.cuda.cuda_device import Way
from rankd.engine.cuda.cuda_executor import CudaExecutor
from rankd.engine.cuda.kernels.triton_state_rows import ArrivedPages, place_pages
from rankd.engine.cuda.paged_states import FP8_LARGEST, PageType
from rankd.engine.cuda.state_pool import StatePool
from rankd.types import Array, Float32Array, UserState
from tests.engine.cuda.interpreted_device import Event, InterpretedDevice
from tests.engine.cuda.plain_attention import ON_GPU, PAGE, Sizes, states_of
from tests.engine.cuda.test_cuda_executor import OPTIONS, made, model_over, near, state_of
from tests.engine.test_native_climber import candidates_of, history_of, schema_of, tensors

ONE_LAYER = OPTIONS | {"layers": 1}
SCHEMA = schema_of(1)


def unreadable(state: UserState, mark: bytes) -> UserState:
    """A state of which nobody can read more than its lengths."""
    arrays = {name: array if name == "lengths" else np.full_like(array, 20_000) for name, array in state.arrays.items()}
    return UserState(arrays, state.lengths, mark)


def marked(executor: CudaExecutor, history: dict[str, Array], mark: bytes) -> UserState:
    """A state that the executor has made and kept."""
    state = state_of(executor, history)
    executor.keep(mark)
    return UserState(state.arrays, state.lengths, mark)


def parts_of(history: dict[str, Array], first: int) -> list[dict[str, Array]]:
    """The first events of a history with one block, and the rest."""
    size = int(history["history_length"][0, 0])
    return [
        {name: a[:, :, part] if a.ndim > 2 else np.full_like(a, count) for name, a in history.items()}
        for part, count in ((slice(0, first), first), (slice(first, size), size - first))
    ]


def test_what_was_made_here_is_found_here_and_nothing_of_it_is_sent() -> None:
    _, executor, device = made(SCHEMA, ONE_LAYER, torch.float32)
    state, candidates = marked(executor, history_of(SCHEMA, 20, [20]), b"first"), candidates_of(SCHEMA, 5)
    logits = executor.score([UserState(state.arrays, state.lengths)], candidates)  # sent
    before = device.counts["transfers"]
    assert (executor.score([unreadable(state, b"first")], candidates) == logits).all()
    assert device.counts["transfers"] == before + 2
    counts = executor._pool.counts()
    assert (counts.found, counts.sent, counts.states) == (1, 1, 1)


def test_a_state_of_another_mark_is_sent_and_stays() -> None:
    _, executor, _ = made(SCHEMA, ONE_LAYER, torch.float32)
    candidates = candidates_of(SCHEMA, 5)
    marked(executor, history_of(SCHEMA, 20, [20], 1), b"other")
    state = state_of(executor, history_of(SCHEMA, 20, [20], 2))
    logits = executor.score([state], candidates)
    named = UserState(state.arrays, state.lengths, b"mine")
    assert (executor.score([named], candidates) == logits).all()
    both = executor.score([unreadable(state, b"mine")] * 2, repeated(candidates, 2))
    near(both, np.concatenate([logits] * 2), 1e-6)
    counts = executor._pool.counts()
    assert (counts.found, counts.sent) == (2, 2)


@torch.inference_mode()
@pytest.mark.parametrize("there", [True, False], ids=["there", "sent"])
def test_an_extended_state_is_never_taken_for_the_one_before(there: bool) -> None:
    climber, executor, _ = made(SCHEMA, OPTIONS, torch.float32)
    whole, candidates = history_of(SCHEMA, 20, [20]), candidates_of(SCHEMA, 5)
    first, rest = parts_of(whole, 15)
    before = marked(executor, first, b"15" if there else b"else")
    before = UserState(before.arrays, before.lengths, b"15")
    short = executor.score([before], candidates)
    executor.extend(unreadable(before, b"15"), rest)
    executor.keep(b"20")
    nothing = np.zeros((1, 1, 2, 2, 0, 24), np.float32)
    longer = UserState({"keys_values": nothing, "lengths": np.array([[20]])}, (20,), b"20")
    expected = climber.score(climber.encode(tensors(whole)), tensors(candidates)).numpy()
    near(executor.score([longer], candidates), expected, 1e-5)
    assert (executor.score([before], candidates) == short).all()  # the host has it still, and sends it again
    near(executor.score([longer], candidates), expected, 1e-5)


def test_what_got_no_name_is_found_by_nobody_and_leaves_first() -> None:
    _, executor, _ = made(SCHEMA, ONE_LAYER, torch.float32)
    for seed in range(3):
        state_of(executor, history_of(SCHEMA, 20, [20], seed))
    assert executor._pool.counts().states == 1  # the last one, until the next
    executor.keep(b"named")
    assert executor._pool.has(b"named")


@pytest.mark.parametrize("eager", [None, Way.IN, Way.COMPUTE, Way.OUT], ids=["none", "in", "compute", "out"])
def test_states_come_one_after_the_other_in_whatever_order_the_gpu_does_things(eager: Way | None) -> None:
    device = InterpretedDevice(eager=eager)
    _, executor, _ = made(SCHEMA, ONE_LAYER, torch.float32, device)
    candidates = candidates_of(SCHEMA, 3)  # and twice as many users as there are turns
    states = [state_of(executor, history_of(SCHEMA, 20, [17 + seed], seed)) for seed in range(4)]
    alone = [executor.score([state], candidates) for state in states]
    together = executor.score(states, repeated(candidates, 4))
    near(together, np.concatenate(alone), 1e-6)


def test_more_users_than_there_are_pages_for_are_scored_in_parts() -> None:
    _, executor, _ = made(SCHEMA, ONE_LAYER, torch.float32, users=2)
    states = [state_of(executor, history_of(SCHEMA, 20, [20], seed)) for seed in range(3)]
    candidates = candidates_of(SCHEMA, 3)
    alone = [executor.score([state], candidates) for state in states]
    near(executor.score(states, repeated(candidates, 3)), np.concatenate(alone), 1e-6)


@torch.inference_mode()
def test_e4m3_pages_score_within_their_bound_found_or_sent() -> None:
    climber, executor, _ = made(SCHEMA, OPTIONS, torch.bfloat16, kind=PageType.FP8)
    assert executor._shape.page_bytes < 0.7 * executor._model.state_shape().page_bytes
    history, candidates = history_of(SCHEMA, 20, [20]), candidates_of(SCHEMA, 5)
    state = marked(executor, history, b"mine")
    expected = climber.score(climber.encode(tensors(history)), tensors(candidates)).numpy()
    near(executor.score([unreadable(state, b"mine")], candidates), expected, 4e-2)
    near(executor.score([UserState(state.arrays, state.lengths)], candidates), expected, 4e-2)


class Meeting(InterpretedDevice):
    """Both of two calls have launched everything before one of them waits."""

    def __init__(self) -> None:
        super().__init__(eager=Way.IN)
        self.both: threading.Barrier | None = None

    def wait(self, event: Event) -> None:
        """After the other one came here."""
        if self.both is not None:
            self.both.wait(10)
        super().wait(event)


def test_one_call_is_sent_while_the_one_before_is_computed() -> None:
    device = Meeting()
    _, model = model_over(SCHEMA, ONE_LAYER, torch.float32)
    shape = model.state_shape()
    pool = StatePool(device, shape, 4 * shape.pages_a_user)
    executors = [CudaExecutor(model, pool, device) for _ in range(2)]
    candidates = candidates_of(SCHEMA, 3)
    states = [marked(one, history_of(SCHEMA, 20, [20], seed), bytes([seed + 1])) for seed, one in enumerate(executors)]
    alone = [one.score([state], candidates) for one, state in zip(executors, states, strict=True)]
    device.done, device.both = [], threading.Barrier(2)
    made_of: dict[int, Float32Array] = {}

    def call(number: int) -> None:
        made_of[number] = executors[number].score([states[number]], candidates)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [name.split()[0] for name in device.done] in (
        ["in", "in", "compute", "out", "compute", "out"],
        ["in", "in", "compute", "compute", "out", "out"],
    )
    for number in range(2):
        assert (made_of[number] == alone[number]).all()


@pytest.mark.parametrize("kind", PageType, ids=lambda kind: kind.value)
def test_pages_arrive_in_their_places_and_nowhere_else(kind: PageType) -> None:
    sizes = Sizes(2, 2, 2, 8)
    states = states_of(sizes, torch.tensor([[2 * PAGE, PAGE]]), kind)
    before = states.keys_values.float().clone(), states.times.clone()
    came = torch.randn(3, sizes.layers, 2, PAGE, sizes.width)
    times = torch.randint(0, 100, (3, PAGE), dtype=torch.int32)
    places = torch.tensor([3, 0, 2], dtype=torch.int32)
    dtype = torch.float32 if kind is PageType.FP32 else torch.bfloat16
    arrived = ArrivedPages(torch.tensor([2], dtype=torch.int32), places, times, came.to(dtype))
    place_pages(states, arrived, sizes.heads)
    numbers = states.keys_values.float()
    if kind is PageType.FP8:
        numbers = numbers * states.scales.repeat_interleave(sizes.head, -1)
        assert float(states.keys_values.float().abs().max()) <= FP8_LARGEST
    for number, place in enumerate([3, 0]):
        error = (numbers[place] - came[number].to(dtype).float()).abs().max()
        assert float(error) <= (0.07 * float(came[number].abs().max()) if kind is PageType.FP8 else 0.0)
        assert (states.times[place] == times[number]).all()
    for place in (1, 2):
        assert (states.keys_values[place].float() == before[0][place]).all()
        assert (states.times[place] == before[1][place]).all()


def repeated(candidates: dict[str, Array], users: int) -> dict[str, Any]:
    return {name: np.concatenate([array] * users) for name, array in candidates.items()}


if ON_GPU:
    pytest.skip("CPU tensors are not on the GPU", allow_module_level=True)
