"""Page-locked memory: who asks is told what lies in it; where it is refused everything goes on without."""

from __future__ import annotations

import ctypes
import logging
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from rankd.engine.backend import EngineConfig
from rankd.engine.cuda import locked_pages as locked_pages_module
from rankd.engine.cuda.cuda_backend import CudaBackend
from rankd.engine.cuda.locked_pages import available_bytes, locked_pages
from rankd.engine.cuda.pinned_memory import PinnedMemory, address_of
from rankd.engine.mixed_targets import MixedBackend
from rankd.engine.processes.shared_file import SharedFile
from rankd.engine.reference_backend import ReferenceBackend
from rankd.states.arena import Arena
from rankd.types import Bytes
from tests.engine.cuda.interpreted_device import InterpretedDevice
from tests.engine.cuda.test_calls_in_flight import ARTIFACT, MODEL

CONFIG = EngineConfig(gpu_state_mib=1, calls_in_flight=1)


def test_it_holds_what_lies_in_it_up_to_its_edges() -> None:
    memory = PinnedMemory(InterpretedDevice())
    whole = torch.zeros(3 << 10, dtype=torch.uint8)
    memory._device.pinned = lambda num_bytes: whole[1024:2048]  # type: ignore[method-assign]
    assert address_of(whole.numpy()) % 16 == 0
    piece, around = memory.allocate(1024), whole.numpy()
    assert memory.holds(piece)
    assert memory.holds(piece[:16])
    assert memory.holds(piece[-16:])
    assert memory.holds(piece.view(np.float32).reshape(2, 4, 32)[1:])
    assert memory.holds(around[1024:2048])
    for outside in (around, around[1008:1024], around[1008:1040], around[2032:2064], around[2048:2064], around[:16]):
        assert not memory.holds(outside)
    assert not memory.holds(np.zeros(16, np.uint8))
    assert not memory.holds(piece[8:])  # from no multiple of 16 bytes on
    assert not memory.holds(piece.reshape(32, 32)[:, :16])  # with gaps
    assert not memory.holds(piece[16:16])


def test_it_forgets_what_nobody_has_any_more() -> None:
    memory = PinnedMemory(InterpretedDevice())
    pieces = [memory.allocate(size) for size in (1 << 12, 0, 1 << 13)]
    view = pieces[0][64:128].view(np.int32).reshape(4, 4)
    kept = torch.from_numpy(pieces[2])  # the addresses stay somebody's
    pieces.clear()
    assert memory.holds(view)
    assert len(memory._ends) == 2
    assert memory.holds(kept.numpy())
    address = address_of(view)
    del view
    again = np.ctypeslib.as_array((ctypes.c_uint8 * 64).from_address(address))
    assert not memory.holds(again)
    assert len(memory._ends) == len(memory._starts) == 1


def test_threads_may_ask_at_once() -> None:
    memory = PinnedMemory(InterpretedDevice())
    wrong: list[Bytes] = []

    def ask() -> None:
        for _ in range(200):
            piece = memory.allocate(256)
            wrong.extend([] if memory.holds(piece) and not memory.holds(np.zeros(256, np.uint8)) else [piece])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not memory.holds(np.zeros(256, np.uint8))
    assert not memory._ends


def test_where_it_is_refused_ordinary_memory_is_given_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    memory = PinnedMemory(InterpretedDevice(lockable=1 << 20))
    with caplog.at_level(logging.WARNING, "rankd"):
        refused = [memory.allocate(size) for size in (3 << 20, 2 << 20)]
    assert [len(piece) for piece in refused] == [3 << 20, 2 << 20]
    for piece in refused:
        assert not piece.any()
        assert address_of(piece) % 64 == 0
        piece[:] = 1
        assert not memory.holds(piece)
    assert memory.holds(memory.allocate(1 << 20))
    (said,) = caplog.messages
    assert said.startswith("3 MiB of host memory cannot be locked (the GPU failed: no 3145728 bytes can be locked)")
    assert "Lower states.budget_mib, or let this process lock more" in said


def test_a_backend_gives_it_to_the_states_alone_or_in_a_mix() -> None:
    backend = CudaBackend(MODEL, InterpretedDevice, CONFIG)
    other = ReferenceBackend.load(ARTIFACT, EngineConfig(), backend.precision, backend.state_type)
    for host_memory in (backend.host_memory, MixedBackend([other, backend]).host_memory):
        assert host_memory is not None
        arena = Arena(1 << 20, [1 << 10, 1 << 12], host_memory)
        slab = arena.take(1 << 10)
        assert slab is not None
        assert backend._memory.holds(arena.bytes_of(slab))


def test_what_processes_share_is_not_in_it() -> None:
    shared = SharedFile()
    assert not PinnedMemory(InterpretedDevice()).holds(shared.allocate(1 << 12))
    shared.close()


class Driver:
    """A driver that locks pages, or says why not."""

    def __init__(self, says: int = 0) -> None:
        self.says, self.locked = says, dict[int, int]()

    def cuMemHostRegister_v2(self, address: ctypes.c_void_p, size: ctypes.c_size_t, flags: ctypes.c_uint) -> int:  # noqa: N802
        """Remembered."""
        assert address.value is not None
        assert address.value % 4096 == 0
        assert flags.value == 3
        self.locked[address.value] = size.value
        return self.says


def test_large_pieces_are_locked_exactly_and_unlocked_before_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, unlocked = Driver(), list[int]()
    monkeypatch.setattr(locked_pages_module, "unlock", unlocked.append)
    tensor = locked_pages(5000, lambda name: driver)
    array = tensor.numpy()
    assert driver.locked == {address_of(array): 5000}
    assert not array.any()
    array[:] = 7
    del tensor
    assert not unlocked
    del array
    assert unlocked == list(driver.locked)
    with pytest.raises(RuntimeError, match="the driver says 2"):
        locked_pages(5000, lambda name: Driver(2))


def test_no_more_is_locked_than_the_machine_can_spare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (available_bytes() or 1 << 20) >= 1 << 20
    monkeypatch.setattr(locked_pages_module, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(locked_pages_module, "GROUP", tmp_path)
    assert available_bytes() is None
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 2048 kB\n")
    assert available_bytes() == 2 << 20
    with pytest.raises(RuntimeError, match="2 MiB of memory are available"):
        locked_pages(3 << 20, lambda name: Driver())
    monkeypatch.setattr(locked_pages_module, "unlock", lambda address: None)
    assert len(locked_pages(1 << 20, lambda name: Driver())) == 1 << 20
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert available_bytes() == 2 << 20
    for most, left in (("5096", 4096), ("900", 0)):  # of a container
        (tmp_path / "memory.max").write_text(f"{most}\n")
        assert available_bytes() == left
