"""`rankd demo --once --json`, as a newcomer would run it."""

from __future__ import annotations

import json
import subprocess
import sys


def test_the_demo_ranks_and_measures() -> None:
    command = [sys.executable, "-m", "rankd", "demo", "--once", "--json", "--port", "0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout.splitlines()[-1])
    assert document["model"] == "demo"
    *known, stranger = document["users"]
    assert len(known) == 3
    assert all(user["history"] and len(user["top"]) == 5 for user in known)
    assert stranger["history"] == []
    for user in document["users"]:
        clicks = [item["probabilities"]["click"] + 0.0 for item in user["top"]]
        assert all(0 < click < 1 for click in clicks)
        assert all(item["name"] for item in user["top"])
    latency = document["latency_ms"]
    assert 0 < latency["p50"] <= latency["p99"]
    assert set(document["stages_ms"]) == {"queue", "features", "encode", "score", "order", "total"}
