"""A model whose tables a plan put on shards: real shard processes, and a ranker that answers as if all were here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from rankd import Ranker, Scores
from rankd.cli import rankd
from rankd.errors import ConfigError, DeadlineExceeded, Unavailable
from rankd.plan.plan_file import read_plan
from rankd.shards.shard_config import ShardClientConfig, ShardSecurity, TableDefault
from rankd.shards.table_config import TableConfig
from tests.features.stores.redis_server import eventually
from tests.free_ports import free_port
from tests.shards.films import ENGINE, REQUESTS

PATIENT = ShardClientConfig(timeout_ms=10_000.0, heartbeat_seconds=10.0)
"""What a shard answers is tested, not how soon: a machine does other things too."""


@pytest.fixture(scope="module")
def plan(version: Path) -> Path:
    """Two shards; tables of at most 2 KiB are in the ranker's own process."""
    path = version.parent.parent / "plan.json"
    arguments = ["plan", str(version), "--shards", "2", "--strategy", "load-balanced", "--replicate", "2KiB"]
    done = CliRunner().invoke(rankd, [*arguments, "--out", str(path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    file = read_plan(path)
    assert file.plan.replicated
    assert [len(shard.parts) > 0 for shard in file.plan.shards] == [True, True]
    return path


@contextmanager
def shard(plan: Path, tables: Path, number: int, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A shard as users start it: its address and its process."""
    command = [sys.executable, "-m", "rankd", "shard", "serve", str(plan), str(tables), "--shard", str(number)]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1], process
        finally:
            process.kill()


def ranked(version: Path, tables: TableConfig | None = None) -> list[Scores]:
    with Ranker.load(version, ENGINE, tables=tables) as ranker:
        return [ranker.rank(request) for request in REQUESTS]


def test_sharded_scores_are_those_of_one_process(version: Path, plan: Path, tmp_path: Path) -> None:
    """One shard reads whole tables, the other its own parts, cut out for it."""
    arguments = ["shard", "split", str(plan), str(version / "embeddings"), "--shard", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(rankd, arguments, catch_exceptions=False)
    parts = read_plan(plan).plan.shards[1].parts
    assert [Path(line).name for line in done.output.split()] == [f"{part.table}.safetensors" for part in parts]
    with ExitStack() as running:
        first, _ = running.enter_context(shard(plan, version / "embeddings", 0))
        second, _ = running.enter_context(shard(plan, tmp_path, 1))
        sharded = ranked(version, TableConfig(plan=str(plan), shards=(first, second), client=PATIENT))
    for here, away in zip(ranked(version), sharded, strict=True):
        np.testing.assert_allclose(away.scores, here.scores, atol=1e-5)
        assert away.degraded == here.degraded == ()


def test_tables_that_are_lost_are_named_or_fail_the_request(version: Path, plan: Path) -> None:
    lost = sorted(part.table for part in read_plan(plan).plan.shards[1].parts)
    defaults = replace(PATIENT, defaults=tuple(TableDefault(name) for name in lost))
    with ExitStack() as running:
        first, _ = running.enter_context(shard(plan, version / "embeddings", 0))
        second, process = running.enter_context(shard(plan, version / "embeddings", 1))
        both = (first, second)
        kind = running.enter_context(
            Ranker.load(version, ENGINE, tables=TableConfig(plan=str(plan), shards=both, client=defaults))
        )
        tables = TableConfig(plan=str(plan), shards=both, client=PATIENT)
        strict = running.enter_context(Ranker.load(version, ENGINE, tables=tables))
        assert kind.rank(REQUESTS[0]).degraded == ()
        before = kind.table_figures()
        assert before is not None
        assert (before.lookups > 0, before.seconds > 0.0) == (True, True)
        assert before.replicas == {"shard-0": 1, "shard-1": 1}
        assert before.calls["calls"] > 0
        process.kill()
        process.wait()
        answer = kind.rank(REQUESTS[0])
        after = kind.table_figures()
        assert after is not None
        assert after.calls["degraded_tables"] > 0 == before.calls["degraded_tables"]
        assert sorted(answer.degraded) == [f"table_{name}" for name in lost]
        assert np.isfinite(answer.scores).all()
        with pytest.raises((Unavailable, DeadlineExceeded)):
            strict.rank(REQUESTS[0])
        assert not strict.schedule.unfinished


def test_a_shard_that_comes_back_is_asked_again(version: Path, plan: Path) -> None:
    with shard(plan, version / "embeddings", 0) as (first, _), ExitStack() as later:
        with shard(plan, version / "embeddings", 1, "--port", str(free_port())) as (second, process):
            tables = TableConfig(plan=str(plan), shards=(first, second), client=PATIENT)
            ranker = later.enter_context(Ranker.load(version, ENGINE, tables=tables))
            expected = ranker.rank(REQUESTS[0]).scores
            process.terminate()
            assert process.wait(20) == 0
        later.enter_context(shard(plan, version / "embeddings", 1, "--port", second.rpartition(":")[2]))
        again = eventually(lambda: answer_of(ranker), "the shard is asked again")
        np.testing.assert_allclose(again.scores, expected, atol=1e-6)


def answer_of(ranker: Ranker) -> Scores | None:
    try:
        return ranker.rank(REQUESTS[0])
    except (Unavailable, DeadlineExceeded):
        return None


def test_a_secret_is_asked_for(version: Path, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKD_SECURITY__SECRET", "sixteen letters long")
    with ExitStack() as running:
        both = tuple(running.enter_context(shard(plan, version / "embeddings", number))[0] for number in (0, 1))
        known = replace(PATIENT, security=ShardSecurity(secret="sixteen letters long"))
        assert ranked(version, TableConfig(plan=str(plan), shards=both, client=known))
        with pytest.raises(Unavailable):
            ranked(version, TableConfig(plan=str(plan), shards=both, start_seconds=1.0))


def test_plans_and_addresses_that_do_not_fit(version: Path, plan: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the plan has 2 shards, and addresses of 1"):
        ranked(version, TableConfig(plan=str(plan), shards=("127.0.0.1:1",)))
    other = tmp_path / "other.json"
    arguments = ["plan", "dlrm-v2", "--shards", "2", "--strategy", "load-balanced", "--out", str(other)]
    assert CliRunner().invoke(rankd, arguments, catch_exceptions=False).exit_code == 0
    with pytest.raises(ConfigError, match="plan again for this model"):
        ranked(version, TableConfig(plan=str(other), shards=("127.0.0.1:1", "127.0.0.1:2")))
    missing = ["shard", "serve", str(plan), str(version / "embeddings"), "--shard", "2"]
    with pytest.raises(ConfigError, match="shards 0 to 1; shard 2"):
        CliRunner().invoke(rankd, missing, catch_exceptions=False)
