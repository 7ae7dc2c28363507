"""Signals end a benchmark through its exits."""

from __future__ import annotations

import os
import signal

import pytest

from rankd.bench.ended_in_order import ended_in_order


def test_sigterm_leaves_through_the_exits() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left, ended_in_order():
        os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
