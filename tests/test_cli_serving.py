"""`rankd serve` and `rankd rank` together: what a server answers is what the command prints."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rankd import Client, RankRequest
from rankd.engine.backend import EngineConfig
from rankd.serve.lifecycle import Server
from rankd.serve.settings import ServeConfig


@pytest.fixture(scope="module")
def server(demo_models: Path) -> Iterator[Server]:
    with Server(demo_models, ServeConfig(port=0, engine=EngineConfig(executors=1))) as running:
        yield running


def rankd(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rankd", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300)


def test_rank_by_address_prints_one_object_on_one_line(server: Server) -> None:
    ids = server.repository.get().catalogue.ids
    asked = ("--user", ids.users[0], "--candidates", ",".join(ids.items[:5]), "--name", "demo", "--top-k", "3")
    result = rankd("rank", "--url", server.url, *asked, "--json")
    assert (result.returncode, len(result.stdout.splitlines())) == (0, 1), result.stderr
    answer = json.loads(result.stdout)
    with Client(server.url) as client:
        expected = client.rank(RankRequest(ids.users[0], ids.items[:5], top_k=3))
    assert tuple(answer["candidates"]) == expected.candidates
    np.testing.assert_allclose(answer["scores"], expected.scores, atol=1e-5)


def test_rank_by_address_prints_a_table(server: Server) -> None:
    items = server.repository.get().catalogue.ids.items
    result = rankd("rank", "--url", server.url, "--user", "new", "--candidates-file", "-", stdin="\n".join(items[:3]))
    assert result.returncode == 0, result.stderr
    for word in (*items[:3], "click", "like", "demo 1", "total"):
        assert word in result.stdout


def test_what_the_server_refuses_is_one_line(server: Server) -> None:
    for asked, words in (
        (("--user", "u", "--candidates", "a", "--name", "dmo"), "Did you mean 'demo'"),
        (("--user", "u"), "candidates"),
    ):
        result = rankd("rank", "--url", server.url, *asked)
        assert (result.returncode, result.stdout) == (2, "")
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_serve_refuses_a_model_that_is_not_there(demo_models: Path) -> None:
    result = rankd("serve", str(demo_models), "--port", "0", "--model", "dmo")
    assert result.returncode == 2
    assert "no model 'dmo'" in result.stderr
    assert "Did you mean 'demo'" in result.stderr
    assert "Traceback" not in result.stderr
