"""A ranker with states whose tables take their time: histories are looked up before they are encoded, the new tokens
alone, and no executor waits for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from rankd import Event, Ranker, RankRequest
from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.model_tables import open_model_tables
from rankd.embeddings.pooling import LookUp, TableSource
from rankd.errors import DeadlineExceeded
from rankd.features.feature_config import FeatureConfig, RowsConfig
from rankd.features.filling.loading import LoadOptions, load_rows
from rankd.features.reading.shared_features import FeatureService
from rankd.types import Float32Array
from tests.features.reading.remote_store import RemoteStore
from tests.serve.filled_store import SCHEMA, item_frame
from tests.shards.films import ENGINE, ITEMS, REQUESTS, build
from tests.shards.plain_tables import until
from tests.shards.test_awaited_tables import HeldTables, asked

PATIENCE = 20.0


class CountedTables(HeldTables):
    """Notes of how many samples each question of a look-up was."""

    def __init__(self, here: TableSource) -> None:
        super().__init__(here, False)
        self.samples: list[list[int]] = []

    def begin(self, asked: Sequence[JaggedIds], into: Sequence[Float32Array], deadline: float | None = None) -> LookUp:
        self.samples.append([one.num_samples for one in asked])
        return super().begin(asked, into, deadline)


@pytest.fixture(scope="module")
def climber(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Climber with its tables beside the graph."""
    return build(tmp_path_factory.mktemp("models"), "climber")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[CountedTables]:
    """The tables of rankers that are loaded in this test."""
    opened: list[CountedTables] = []

    def held(path: Path, widths: Mapping[str, int], _: object) -> TableSource:
        opened.append(CountedTables(open_model_tables(path, widths)))
        return opened[-1]

    monkeypatch.setattr("rankd.ranker.open_tables", held)
    return opened


@pytest.fixture
def placed(climber: Path, made: list[CountedTables]) -> Iterator[tuple[Ranker, CountedTables]]:
    """A ranker with one executor."""
    with Ranker.load(climber, ENGINE) as ranker:
        ranker.states.extend_up_to(dict.fromkeys(ranker.schema.history_buckets, 32))
        yield ranker, made[0]
        for lookup in made[0].held:  # else a test that fails would not end
            lookup.let_go()


def ranked(ranker: Ranker, tables: CountedTables, request: RankRequest) -> tuple[str, list[list[int]]]:
    """Where its state came from, and of how many samples its look-ups were."""
    before = len(tables.samples)
    future, lookup = asked(ranker, tables, request)
    lookup.let_go()
    return future.result(PATIENCE).state, tables.samples[before:]


def test_an_executor_serves_others_while_a_history_is_waited_for(placed: tuple[Ranker, CountedTables]) -> None:
    ranker, tables = placed
    first, slow = asked(ranker, tables, REQUESTS[0])
    second, quick = asked(ranker, tables, REQUESTS[1])
    same, again = asked(ranker, tables, REQUESTS[0])
    quick.let_go()
    assert second.result(PATIENCE).state == "encoded"
    assert not first.done()
    again.let_go()
    assert same.result(PATIENCE).state == "encoded"
    slow.let_go()
    assert first.result(PATIENCE).state == "cached"
    np.testing.assert_allclose(first.result().scores, same.result().scores, atol=1e-5)


def test_what_is_looked_up_is_what_the_kept_state_lacks(placed: tuple[Ranker, CountedTables]) -> None:
    """One look-up a request: the user, the candidates, and the tokens of which nothing is kept."""
    ranker, tables = placed
    kinds, end = ranker.schema.event_types, ranker.schema.log_end
    candidates = ITEMS[:9]
    for number in range(3):
        ranker.append_events("new", (Event(ITEMS[number], kinds[0], end - 50 + number),))
    of_user = [1] if ranker.schema.context_embedded else []
    state, samples = ranked(ranker, tables, RankRequest("new", candidates))
    assert state == "encoded"
    (first,) = samples
    assert first[:-1] == [*of_user, len(candidates)]
    assert 1 <= first[-1] <= 3 + 1  # equal items once, and padding
    assert ranked(ranker, tables, RankRequest("new", candidates)) == ("cached", [[*of_user, len(candidates)]])
    ranker.append_events("new", (Event(ITEMS[7], kinds[0], end - 10),))
    state, samples = ranked(ranker, tables, RankRequest("new", candidates))
    assert state in ("extended", "encoded")  # the view of favourite genres may have moved its oldest tokens
    if state == "extended":
        assert samples[0][-1] <= 2


def test_a_request_that_is_out_of_time_does_not_wait_for_its_history(placed: tuple[Ranker, CountedTables]) -> None:
    ranker, tables = placed
    request = RankRequest(REQUESTS[0].user_id, REQUESTS[0].candidates, timeout_ms=200)
    future, lookup = asked(ranker, tables, request)
    with pytest.raises(DeadlineExceeded):
        future.result(PATIENCE)
    assert lookup.forgotten.wait(PATIENCE)
    assert not ranker.schedule.unfinished
    assert not ranker.states.has(request.user_id)


def test_a_history_is_encoded_while_the_rows_of_the_candidates_come(
    climber: Path, made: list[CountedTables], tmp_path: Path
) -> None:
    """Two look-ups, for the second needs what the store has to say."""
    frame, store = tmp_path / "items.parquet", RemoteStore()
    with Ranker.load(climber, ENGINE) as plain:
        item_frame(plain).write_parquet(frame)
    load_rows(store, "films", SCHEMA, frame, LoadOptions(grace_seconds=0), lambda done, total, line: None)
    service = FeatureService(FeatureConfig(wait_ms=600_000.0, items=RowsConfig(budget_mib=1.0)), store)
    with Ranker.load(climber, ENGINE, features=service) as ranker:
        tables = made[-1]
        store.holds = {"get"}
        future = ranker.submit(REQUESTS[0])
        until(lambda: bool(tables.held))
        tables.held[0].let_go()
        until(lambda: ranker.states.has(REQUESTS[0].user_id))
        assert (len(tables.held), future.done()) == (1, False)
        store.release_all()
        until(lambda: len(tables.held) > 1)
        tables.held[1].let_go()
        answer = future.result(PATIENCE)
    service.close()
    assert answer.state == "encoded"
    assert [len(one) for one in tables.samples] == [1, 2 if ranker.schema.context_embedded else 1]
