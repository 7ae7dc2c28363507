"""What a process has used of the machine."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from rankd.bench.placement import cpu_seconds

USES = """
import threading, time

def use():
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass

thread = threading.Thread(target=use)
thread.start()
thread.join()
print(time.process_time(), flush=True)
input()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say it of another process")
def test_threads_that_have_ended_count_too() -> None:
    with subprocess.Popen([sys.executable, "-c", USES], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        own = float(process.stdout.readline())
        time.sleep(0.05)
        assert 0.2 <= own <= cpu_seconds(process.pid) < own + 0.05
        process.kill()
    assert cpu_seconds(process.pid) == 0.0
