"""What can be said of `CudaStreams` without a GPU, with torch's streams and graphs made up."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch

from rankd.engine.cuda.cuda_device import CudaStreams, Way


class Stream:
    def synchronize(self) -> None: ...


class Graph:
    def replay(self) -> None: ...


@pytest.mark.parametrize("way", Way)
def test_what_a_graph_reads_and_writes_lives_as_long_as_its_replay(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph has addresses and keeps no memory."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: Stream())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    rooms = torch.zeros(3)
    seen = weakref.ref(rooms)

    def work(rooms: torch.Tensor = rooms) -> None:
        rooms.zero_()

    replay = CudaStreams().captured(work, way)
    del rooms, work
    gc.collect()
    assert seen() is not None
    del replay
    gc.collect()
    assert seen() is None
