"""States in page-locked memory, on CPU tensors: read and written where they lie, with the same numbers as by copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rankd.engine.backend import StateType
from rankd.engine.cuda import fetched_states
from rankd.engine.cuda.cuda_device import Way
from rankd.engine.cuda.cuda_executor import CudaExecutor
from rankd.engine.cuda.paged_states import PageType
from rankd.engine.cuda.pinned_memory import PinnedMemory
from rankd.engine.state_arrays import empty_state
from rankd.errors import EngineFailure
from rankd.states.arena import Arena
from rankd.states.state_config import Storage
from rankd.states.storage import StateLayout
from rankd.types import Array, UserState
from tests.engine.cuda.interpreted_device import InterpretedDevice
from tests.engine.cuda.plain_attention import ON_GPU
from tests.engine.cuda.test_cuda_executor import OPTIONS, made, state_of
from tests.engine.cuda.test_resident_states import ONE_LAYER, marked, parts_of, repeated, unreadable
from tests.engine.test_native_climber import candidates_of, history_of, schema_of

KINDS = [(torch.float32, PageType.FP32), (torch.bfloat16, PageType.BF16), (torch.bfloat16, PageType.FP8)]
EAGER = pytest.mark.parametrize("eager", [None, *Way], ids=["none", "in", "compute", "out"])
TWO, ONE = schema_of(2), schema_of(1)


def pinned(
    schema: Any, dtype: torch.dtype = torch.float32, kind: PageType | None = None, eager: Way | None = None,
    users: int = 6, options: dict[str, Any] = OPTIONS,
) -> tuple[CudaExecutor, InterpretedDevice, PinnedMemory]:  # fmt: skip
    """An executor that knows of locked memory."""
    device = InterpretedDevice(eager=eager)
    memory = PinnedMemory(device)
    _, executor, _ = made(schema, options, dtype, device, users, kind, memory)
    return executor, device, memory


def arrays_in(memory: PinnedMemory, executor: CudaExecutor, room: int) -> dict[str, Array]:
    """Arrays of a state in locked memory, full of what was there before."""
    arrays = empty_state(executor._model.specs, room, executor._model.state_type, memory=memory.allocate)
    for array in arrays.values():
        array[...] = 77
    return arrays


def locked(memory: PinnedMemory, executor: CudaExecutor, state: UserState, room: int, mark: bytes = b"") -> UserState:
    """The same state in locked memory, with another room; what is beyond its tokens is not zero."""
    arrays = arrays_in(memory, executor, room)
    for name, axis in (("keys_values", 4), ("times", 2)):
        size = min(room, state.arrays[name].shape[axis])
        part = (slice(None),) * axis + (slice(0, size),)
        arrays[name][part] = state.arrays[name][part]
    arrays["lengths"][...] = state.arrays["lengths"]
    return UserState(arrays, state.lengths, mark)


def sizes_in(done: list[str], way: str) -> list[int]:
    """Bytes of the transfers of a way."""
    return [int(name.split()[1]) for name in done if name.startswith(way + " ") and name.split()[1].isdigit()]


@pytest.mark.parametrize(
    ("dtype", "kind", "eager"),
    [(*KINDS[0], None), (*KINDS[1], Way.IN), (*KINDS[2], Way.COMPUTE), (*KINDS[0], Way.OUT)],
    ids=["fp32", "bf16-in", "fp8-compute", "fp32-out"],
)
def test_states_are_read_where_they_lie_with_the_same_scores(
    dtype: torch.dtype, kind: PageType, eager: Way | None
) -> None:
    executor, device, memory = pinned(TWO, dtype, kind, eager)
    lengths, rooms = ([19, 3], [1, 16], [0, 20], [0, 0]), (20, 57, 33, 8)
    candidates = repeated(candidates_of(TWO, 3), 4)
    states = [state_of(executor, history_of(TWO, 20, whole, seed)) for seed, whole in enumerate(lengths)]
    staged = executor.score(states, candidates)
    here = [locked(memory, executor, state, room) for state, room in zip(states, rooms, strict=True)]
    device.done.clear()
    assert (executor.score(here, candidates) == staged).all()
    (call, table), pages = sizes_in(device.done, "in"), executor._shape.pages_a_user
    assert table <= 256 + fetched_states.USERS_AT_ONCE * pages * 8 * 5
    assert table < call + min(state.arrays["keys_values"].nbytes for state in states)
    assert [name for name in device.done if "kernel" in name] == ["in kernel"]
    both = [here[0], states[1], here[2], states[3]]  # some of them lie elsewhere
    assert (executor.score(both, candidates) == staged).all()
    device.done.clear()
    assert (executor.score([here[3]] * 4, candidates) == executor.score([states[3]] * 4, candidates)).all()
    assert len(sizes_in(device.done, "in")) == 2  # of a state without tokens nothing is sent


def test_more_states_than_a_table_has_rows_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetched_states, "USERS_AT_ONCE", 1)
    executor, device, memory = pinned(ONE, options=ONE_LAYER)
    pages, candidates = executor._shape.pages_a_user, repeated(candidates_of(ONE, 2), 5)
    longest = executor._shape.longest
    states = [state_of(executor, history_of(ONE, longest, [longest - seed], seed)) for seed in range(5)]
    staged = executor.score(states, candidates)
    device.done.clear()
    assert (executor.score([locked(memory, executor, s, longest) for s in states], candidates) == staged).all()
    assert device.done.count("in kernel") == 5
    assert max(sizes_in(device.done, "in")[1:]) == 256 + pages * 40


@EAGER
def test_a_state_that_is_read_where_it_lies_is_extended_and_stays(eager: Way | None) -> None:
    executor, device, memory = pinned(ONE, eager=eager)
    first, rest = parts_of(history_of(ONE, 25, [25]), 20)
    before = state_of(executor, first)
    expected = executor.extend(before, rest)
    again = executor.extend(locked(memory, executor, before, 40, b"20"), rest)
    assert all((again[name] == array).all() for name, array in expected.items())
    assert "in kernel" in device.done
    candidates = candidates_of(ONE, 3)
    alone = executor.score([before], candidates)
    assert (executor.score([locked(memory, executor, before, 20, b"there")], candidates) == alone).all()
    device.done.clear()
    assert (executor.score([unreadable(before, b"there")], candidates) == alone).all()
    assert len(device.done) == 3  # found: a call, computed, fetched


@pytest.mark.parametrize(
    ("dtype", "eager"),
    [(torch.float32, None), (torch.bfloat16, Way.IN), (torch.float32, Way.COMPUTE), (torch.bfloat16, Way.OUT)],
    ids=["fp32", "bf16-in", "fp32-compute", "bf16-out"],
)
def test_new_states_are_written_where_they_belong(dtype: torch.dtype, eager: Way | None) -> None:
    executor, device, memory = pinned(TWO, dtype, eager=eager)
    rooms, lengths = (20, 18, 33, 8), ([19, 3], [1, 18], [0, 33], [0, 0])
    histories = [history_of(TWO, room, whole, room) for room, whole in zip(rooms, lengths, strict=True)]
    staged = executor.encode_all(histories, [None] * 4)
    into = [arrays_in(memory, executor, room) for room in rooms]
    device.done.clear()
    straight = executor.encode_all(histories, into)
    assert all(one is own for one, own in zip(straight, into, strict=True))
    check_same(straight, staged)
    assert device.done[-2:] == ["compute", "out kernel"]
    some = [arrays_in(memory, executor, room) if room != 18 else None for room in rooms]
    into[1]["keys_values"][...] = 55
    check_same(executor.encode_all(histories, some), staged)
    assert (into[1]["keys_values"] == 55).all()  # the user before who had this place in a call
    assert [name.split()[:2] for name in device.done[-2:]] == [["out", "kernel"], ["out", device.done[-1].split()[1]]]
    check_same([executor.encode(histories[0], arrays_in(memory, executor, 20))], staged[:1])
    ordinary = {name: np.full_like(array, 77) for name, array in staged[1].items()}
    check_same([executor.encode(histories[1], ordinary)], staged[1:2])


def check_same(made_: Any, expected: Any) -> None:
    """Of several states all arrays, padding included."""
    for one, other in zip(made_, expected, strict=True):
        assert one.keys() == other.keys()
        for name, array in one.items():
            assert (array == other[name]).all(), name


def test_what_is_too_small_or_of_another_type_is_not_written_to_by_the_gpu() -> None:
    executor, device, memory = pinned(ONE, options=ONE_LAYER)
    history = history_of(ONE, 20, [20])
    executor.encode(history)
    device.done.clear()
    with pytest.raises(ValueError, match="broadcast"):
        executor.encode(history, arrays_in(memory, executor, 16))
    halves = empty_state(executor._model.specs, 20, StateType.BF16, memory=memory.allocate)
    executor.encode(history, halves)
    assert "out kernel" not in device.done
    short = locked(memory, executor, state_of(executor, history), 16)
    with pytest.raises(ValueError, match="broadcast"):
        executor.score([short], candidates_of(ONE, 2))
    assert "in kernel" not in device.done


def test_a_call_that_fails_leaves_only_when_nothing_of_it_reads_or_writes_the_host() -> None:
    executor, device, memory = pinned(ONE, options=ONE_LAYER)
    history, candidates = history_of(ONE, 20, [20]), candidates_of(ONE, 3)
    state = locked(memory, executor, state_of(executor, history), 20)
    logits = executor.score([state], candidates)
    executor.encode(history, arrays_in(memory, executor, 20))
    broken = [True]
    wait = device.wait

    def fails(event: Any) -> None:
        if event.way is Way.OUT and broken:
            broken.clear()
            raise RuntimeError("a wait failed")
        wait(event)

    device.wait = fails  # type: ignore[method-assign]
    with pytest.raises(EngineFailure, match="a wait failed"):
        executor.score([state], candidates)
    assert not any(device._ways.values())
    broken.append(True)
    with pytest.raises(EngineFailure, match="a wait failed"):
        executor.encode(history, arrays_in(memory, executor, 20))
    assert not any(device._ways.values())
    device.wait = wait  # type: ignore[method-assign]
    assert (executor.score([state], candidates) == logits).all()


def test_where_nothing_can_be_locked_states_are_copied_as_before() -> None:
    device = InterpretedDevice(lockable=1 << 18)  # enough for what calls send
    memory = PinnedMemory(device)
    _, executor, _ = made(ONE, ONE_LAYER, torch.float32, device, memory=memory)
    layout = StateLayout(executor._model.specs, executor._model.state_type, Storage.AUTO)
    arena = Arena(1 << 20, [layout.size_bytes(20)], memory.allocate)
    slab = arena.take(layout.size_bytes(20))
    assert slab is not None
    history, candidates = history_of(ONE, 20, [20]), candidates_of(ONE, 3)
    arrays = executor.encode(history, layout.arrays(arena.bytes_of(slab), 20))
    check_same([arrays], [executor.encode(history)])
    logits = executor.score([UserState(arrays, (20,))], candidates)
    assert (logits == executor.score([state_of(executor, history)], candidates)).all()
    assert not [name for name in device.done if "kernel" in name]
    assert max(sizes_in(device.done, "in")) > arrays["keys_values"].nbytes


def test_states_of_an_arena_are_reached() -> None:
    executor, device, memory = pinned(ONE, options=ONE_LAYER)
    layout = StateLayout(executor._model.specs, executor._model.state_type, Storage.AUTO)
    arena = Arena(1 << 20, [layout.size_bytes(room) for room in (16, 24)], memory.allocate)
    history, candidates = history_of(ONE, 20, [20]), candidates_of(ONE, 3)
    expected = executor.score([marked(executor, history, b"a")], candidates)
    for _ in range(2):
        slab = arena.take(layout.size_bytes(24))
        assert slab is not None
        longer = history_of(ONE, 20, [20]) | {
            name: np.concatenate([array, np.zeros_like(array[:, :, :4])], 2)
            for name, array in history.items()
            if array.ndim > 2
        }
        device.done.clear()
        arrays = executor.encode(longer, layout.arrays(arena.bytes_of(slab), 24))
        assert device.done[-1] == "out kernel"
        assert (executor.score([UserState(arrays, (20,))], candidates) == expected).all()
        assert "in kernel" in device.done


if ON_GPU:
    pytest.skip("CPU tensors are not on the GPU", allow_module_level=True)
