"""Tables that move while they are asked: no look-up fails, and every sum is that of tables that never moved."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankd.embeddings.model_tables import open_model_tables
from rankd.embeddings.pooling import TableSource
from rankd.embeddings.table_spec import TableSpec
from rankd.embeddings.table_writing import write_table
from rankd.errors import ConfigError, RankdError, ShardFailure
from rankd.plan.plan_file import FORMAT, PlanFile
from rankd.plan.strategies import make_plan
from rankd.plan.table_plan import MemoryLimits, Strategy
from rankd.shards.placement_file import Placement, read_placement, write_placement
from rankd.shards.planned_shards import identity, open_shard, served_nets
from rankd.shards.shard_config import ShardClientConfig, ShardServerConfig
from rankd.shards.shard_server import ShardServer
from rankd.shards.table_config import TableConfig, open_tables
from tests.embeddings.made_tables import asked_of
from tests.plan.made_up import load_of
from tests.shards.plain_tables import Asking, until

LOADS = [load_of("item", 101, 4), load_of("user", 40, 3), load_of("city", 5, 2)]
WIDTHS = {load.name: load.spec.dim for load in LOADS}
ASKED = asked_of(tuple(WIDTHS), [[3, 100], [], [4, 4], [39], [0, 1], [7], [2], [4], []])
CLIENT = ShardClientConfig(timeout_ms=30_000.0, first_wait_seconds=0.01, longest_wait_seconds=0.05)
"""Connects again quickly."""


def planned(num_shards: int, replicate_bytes: int = 0) -> PlanFile:
    """A plan of so many shards, none for 0; tables up to so many bytes are in the asking process."""
    strategy = Strategy.LOAD_BALANCED if num_shards else Strategy.SINGULAR
    limits = MemoryLimits(replicate_bytes=replicate_bytes)
    return PlanFile(FORMAT, "films", (), make_plan(strategy, LOADS, num_shards, limits))


PLANS = (planned(1), planned(2), planned(4), planned(2, 40), planned(0))


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version's folder with tables and nothing else."""
    folder = tmp_path_factory.mktemp("version")
    random = np.random.default_rng(0)
    (folder / "embeddings").mkdir()
    for spec in (load.spec for load in LOADS):
        write_table(folder / "embeddings", spec, [random.standard_normal((spec.rows, spec.dim), np.float32)])
    return folder


def start_shards(version: Path, plan: PlanFile, replicas: int = 1) -> tuple[list[ShardServer], Placement]:
    """The shards of a plan in threads of this process, and where they are (generation 1)."""
    servers = [
        [
            ShardServer(
                open_shard(plan, number, version / "embeddings"),
                identity(plan),
                served_nets(plan, number),
                ShardServerConfig(workers=1),
            )
            for _ in range(replicas)
        ]
        for number in range(len(plan.plan.shards))
    ]
    started = [server for own in servers for server in own]
    for server in started:
        server.start()
    return started, Placement(1, plan, tuple(tuple(server.address for server in own) for own in servers))


def look_up(tables: TableSource) -> tuple[np.ndarray, tuple[str, ...]]:
    """The sums of `ASKED`, and which tables could not be had."""
    sums = np.full((ASKED.num_samples, sum(WIDTHS.values())), np.nan, np.float32)
    lost = tables.begin([ASKED], [sums]).finish()
    return sums, lost


def at(placement: Placement, generation: int) -> Placement:
    return Placement(generation, placement.plan, placement.shards)


@contextmanager
def following(version: Path, file: Path, start_seconds: float = 10.0) -> Iterator[TableSource]:
    config = TableConfig(placement=str(file), start_seconds=start_seconds, client=CLIENT)
    tables = open_tables(version, WIDTHS, config)
    assert tables is not None
    try:
        yield tables
    finally:
        tables.close()


class Lookups(Asking):
    """Threads that look up all the time, until the end of the block."""

    def __init__(self, tables: TableSource, expected: np.ndarray, threads: int = 3) -> None:
        super().__init__(threads)
        self._tables, self._expected = tables, expected

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            try:
                sums, degraded = look_up(self._tables)
            except RankdError as error:
                self.wrong.append(str(error))
                continue
            if degraded or not np.allclose(sums, self._expected, atol=1e-5):
                self.wrong.append(f"other sums, degraded {degraded}")
            with self._lock:
                self.right += 1


def unmoved(version: Path) -> np.ndarray:
    with open_model_tables(version, WIDTHS) as tables:
        return look_up(tables)[0]


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(PLANS) - 1), st.integers(1, 2)), min_size=2, max_size=4))
def test_no_look_up_fails_while_tables_move(version: Path, tmp_path: Path, moves: Sequence[tuple[int, int]]) -> None:
    """Each placement's shards are ended as soon as `generation` says that nobody asks them any more."""
    file = tmp_path / "placement.json"
    with ExitStack() as stack:
        old, first = start_shards(version, PLANS[moves[0][0]], moves[0][1])
        write_placement(file, first)
        tables = stack.enter_context(following(version, file))
        looking = stack.enter_context(Lookups(tables, unmoved(version)))
        for generation, (plan, replicas) in enumerate(moves[1:], 2):
            new, placement = start_shards(version, PLANS[plan], replicas)
            write_placement(file, at(placement, generation))
            until(lambda generation=generation: tables.generation() == generation)  # type: ignore[misc]
            for server in old:
                server.close()  # not a drain: nobody may be asking
            old, end = new, looking.right + 20
            until(lambda end=end: looking.right >= end)  # type: ignore[misc]
    for server in old:
        server.close()
    assert looking.wrong == []


def test_calls_are_counted_across_placements(version: Path, tmp_path: Path) -> None:
    file = tmp_path / "placement.json"
    servers, placement = start_shards(version, PLANS[1])
    write_placement(file, placement)
    with following(version, file) as tables:
        look_up(tables)
        assert tables.calls()["calls"] == 2
        write_placement(file, at(placement, 2))
        until(lambda: tables.generation() == 2)
        assert tables.calls()["calls"] == 2
        look_up(tables)
        assert tables.calls()["calls"] == 4
        assert tables.replicas_up() == {"shard-0": 1, "shard-1": 1}
    for server in servers:
        server.close()


def test_a_placement_that_cannot_be_used_changes_nothing_until_a_better_one_comes(
    version: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "placement.json"
    servers, placement = start_shards(version, PLANS[1])
    write_placement(file, placement)
    others = PlanFile(FORMAT, "films", (), make_plan(Strategy.ONE_SHARD, LOADS[:2], 1, MemoryLimits(replicate_bytes=0)))
    nobody = Placement(2, PLANS[1], (("127.0.0.1:1",), ("127.0.0.1:1",)))
    with following(version, file, start_seconds=0.3) as tables:
        for content, complaint in (
            ('{"generation": 2}', "missing required field"),
            ("{", "is not valid JSON"),
            (Placement(2, others, (("127.0.0.1:1",),)), "plan again for this model"),
            (nobody, "cannot be asked"),
        ):
            if isinstance(content, Placement):
                write_placement(file, content)
            else:
                file.write_text(content)
            until(lambda complaint=complaint: complaint in caplog.text)  # type: ignore[misc]
            assert (tables.generation(), look_up(tables)[1]) == (1, ())
        file.unlink()
        until(lambda: "No such file" in caplog.text)
        write_placement(file, at(placement, 3))
        until(lambda: tables.generation() == 3)
        look_up(tables)
    for server in servers:
        server.close()


def test_a_placement_that_has_lost_less_is_better_than_one_that_has_lost_more(version: Path, tmp_path: Path) -> None:
    """Both shards died; the first is back elsewhere, the second not yet."""
    file = tmp_path / "placement.json"
    servers, placement = start_shards(version, PLANS[1])
    write_placement(file, placement)
    with following(version, file, start_seconds=0.2) as tables:
        for server in servers:
            server.close()
        until(lambda: not any(tables.replicas_up().values()))
        again, moved = start_shards(version, PLANS[1])
        again[1].close()
        write_placement(file, at(moved, 2))
        until(lambda: tables.generation() == 2)
        assert tables.replicas_up() == {"shard-0": 1, "shard-1": 0}
    again[0].close()


@pytest.mark.parametrize("forgotten", [False, True])
def test_look_ups_under_way_end_where_they_began(version: Path, tmp_path: Path, forgotten: bool) -> None:
    file = tmp_path / "placement.json"
    servers, placement = start_shards(version, PLANS[1])
    write_placement(file, placement)
    with following(version, file) as tables:
        sums = np.full((ASKED.num_samples, sum(WIDTHS.values())), np.nan, np.float32)
        begun = tables.begin([ASKED], [sums])
        write_placement(file, at(placement, 2))
        until(lambda: tables._held.placement.generation == 2)  # type: ignore[attr-defined]
        np.testing.assert_allclose(look_up(tables)[0], unmoved(version), atol=1e-5)  # a new one does not wait
        time.sleep(0.2)
        assert tables.generation() == 1, "the old placement is still asked"
        if forgotten:
            begun.forget()
        else:
            assert begun.finish() == ()
            np.testing.assert_allclose(sums, unmoved(version), atol=1e-5)
            begun.forget()  # as a request does when it is dropped
        until(lambda: tables.generation() == 2)
    for server in servers:
        server.close()


def test_a_placement_is_read_as_it_was_written_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "placement.json"
    placement = Placement(7, PLANS[1], (("10.0.0.1:1", "10.0.0.2:1"), ("10.0.0.3:1",)))
    write_placement(file, placement)
    assert read_placement(file) == placement
    assert list(tmp_path.iterdir()) == [file]
    write_placement(file, Placement(8, PLANS[1], (("10.0.0.1:1",), ())))
    with pytest.raises(ConfigError, match="2 shards, and there are addresses of 1"):
        read_placement(file)
    with pytest.raises(ConfigError, match="cannot be written"):
        write_placement(tmp_path / "nowhere" / "placement.json", placement)


def test_what_does_not_go_together_is_refused(version: Path, tmp_path: Path) -> None:
    file = tmp_path / "placement.json"
    with pytest.raises(ConfigError, match=r"tables\.placement names a file"):
        open_tables(version, WIDTHS, TableConfig(plan="plan.json", placement=str(file)))
    write_placement(file, Placement(1, PLANS[0], (("127.0.0.1:1",),)))
    with pytest.raises(ShardFailure, match="cannot be asked"):
        open_tables(version, WIDTHS, TableConfig(placement=str(file), start_seconds=0.2))
    spec = TableSpec("other", 3, 1)
    with pytest.raises(ConfigError, match="plan again for this model"):
        open_tables(version, {spec.name: spec.dim}, TableConfig(placement=str(file)))
