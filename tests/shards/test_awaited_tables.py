"""A ranker whose tables take their time: no executor waits for them, and who is gone has nobody look up for him."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path

import numpy as np
import pytest

from rankd import Ranker, RankRequest, Scores
from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.model_tables import open_model_tables
from rankd.embeddings.pooling import LookUp, TableSource
from rankd.errors import DeadlineExceeded, InvalidRequest
from rankd.features.feature_config import FeatureConfig, RowsConfig
from rankd.features.filling.loading import LoadOptions, load_rows
from rankd.features.reading.shared_features import FeatureService
from rankd.types import Float32Array
from tests.embeddings.still_source import StillSource
from tests.features.reading.remote_store import RemoteStore
from tests.serve.filled_store import SCHEMA, item_frame
from tests.shards.films import ENGINE, REQUESTS
from tests.shards.plain_tables import until


class HeldLookUp:
    """Is there when it is let go."""

    def __init__(self, lookup: LookUp) -> None:
        self._lookup, self._then = lookup, list[Callable[[], None]]()
        self._there, self.forgotten = threading.Event(), threading.Event()

    def there(self) -> bool:
        return self._there.is_set()

    def when_there(self, then: Callable[[], None]) -> None:
        self._then.append(then)

    def finish(self) -> tuple[str, ...]:
        assert self._there.is_set(), "an executor would have waited"
        return self._lookup.finish()

    def forget(self) -> None:
        self.forgotten.set()

    def let_go(self) -> None:
        self._there.set()
        for then in self._then:
            then()


class HeldTables(StillSource):
    """A `TableSource` that holds each look-up back; `local` is what it says of itself."""

    def __init__(self, here: TableSource, local: bool) -> None:
        self._here, self.local = here, local
        self.held: list[HeldLookUp] = []
        self.refused: Exception | None = None

    def begin(self, asked: Sequence[JaggedIds], into: Sequence[Float32Array], deadline: float | None = None) -> LookUp:
        if self.refused is not None:
            raise self.refused
        self.held.append(HeldLookUp(self._here.begin(asked, into, deadline)))
        return self.held[-1]

    def contents(self) -> Mapping[str, str]:
        return self._here.contents()

    def close(self) -> None:
        self._here.close()


@pytest.fixture(params=[False, True], ids=["asked early", "asked by an executor"])
def placed(
    request: pytest.FixtureRequest, version: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Ranker, HeldTables]]:
    """A ranker with one executor."""
    made: list[HeldTables] = []

    def held(path: Path, widths: Mapping[str, int], _: object) -> TableSource:
        made.append(HeldTables(open_model_tables(path, widths), request.param))
        return made[-1]

    monkeypatch.setattr("rankd.ranker.open_tables", held)
    with Ranker.load(version, ENGINE) as ranker:
        monkeypatch.undo()  # others have tables that answer
        yield ranker, made[0]
        for lookup in made[0].held:  # else a test that fails would not end
            lookup.let_go()


def asked(ranker: Ranker, tables: HeldTables, request: RankRequest) -> tuple[Future[Scores], HeldLookUp]:
    """A request, as soon as its tables are asked."""
    before = len(tables.held)
    future = ranker.submit(request)
    until(lambda: len(tables.held) > before)
    return future, tables.held[-1]


def test_shards_are_asked_for_the_rows_that_the_store_has(
    version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not for the model's own, although its history is there before its rows are."""
    made: list[HeldTables] = []

    def held(path: Path, widths: Mapping[str, int], _: object) -> TableSource:
        made.append(HeldTables(open_model_tables(path, widths), False))
        return made[-1]

    frame, store = tmp_path / "items.parquet", RemoteStore()
    with Ranker.load(version, ENGINE) as plain:
        item_frame(plain).write_parquet(frame)
        before = plain.rank(REQUESTS[0]).scores
    load_rows(store, "films", SCHEMA, frame, LoadOptions(grace_seconds=0), lambda done, total, line: None)
    service = FeatureService(FeatureConfig(wait_ms=600_000.0, items=RowsConfig(budget_mib=1.0)), store)
    with Ranker.load(version, ENGINE, items=frame) as fresh:
        expected = fresh.rank(REQUESTS[0]).scores
    assert not np.allclose(before, expected, atol=1e-3)
    monkeypatch.setattr("rankd.ranker.open_tables", held)
    with Ranker.load(version, ENGINE, features=service) as ranker:
        store.holds = {"get"}
        future = ranker.submit(REQUESTS[0])
        store.wait_for(1)
        time.sleep(0.2)
        store.release_all()
        until(lambda: bool(made[0].held))
        made[0].held[-1].let_go()
        np.testing.assert_allclose(future.result(10).scores, expected, atol=1e-5)
    service.close()


def test_an_executor_serves_others_while_tables_are_waited_for(
    placed: tuple[Ranker, HeldTables], version: Path
) -> None:
    ranker, tables = placed
    first, slow = asked(ranker, tables, REQUESTS[0])
    second, quick = asked(ranker, tables, REQUESTS[1])
    quick.let_go()
    other = second.result(10)
    assert not first.done()
    slow.let_go()
    one = first.result(10)
    assert len(tables.held) == 2
    with Ranker.load(version, ENGINE) as plain:
        for scores, request in ((one, REQUESTS[0]), (other, REQUESTS[1])):
            np.testing.assert_allclose(scores.scores, plain.rank(request).scores, atol=1e-5)


def test_a_request_that_is_cancelled_has_nobody_look_up_for_it(placed: tuple[Ranker, HeldTables]) -> None:
    ranker, tables = placed
    future, lookup = asked(ranker, tables, REQUESTS[0])
    assert not lookup.forgotten.is_set()
    future.cancel()
    assert lookup.forgotten.wait(10)
    with pytest.raises(CancelledError):
        future.result(10)
    lookup.let_go()
    assert not ranker.schedule.unfinished


def test_a_request_that_is_out_of_time_does_not_wait_for_tables(placed: tuple[Ranker, HeldTables]) -> None:
    ranker, tables = placed
    request = RankRequest(REQUESTS[0].user_id, REQUESTS[0].candidates, timeout_ms=200)
    future, lookup = asked(ranker, tables, request)
    with pytest.raises(DeadlineExceeded):
        future.result(10)
    assert lookup.forgotten.wait(10)
    assert not ranker.schedule.unfinished


def test_tables_that_refuse_a_request_fail_it(placed: tuple[Ranker, HeldTables]) -> None:
    ranker, tables = placed
    tables.refused = InvalidRequest("row 7 was asked")
    with pytest.raises(InvalidRequest, match="row 7"):
        ranker.submit(REQUESTS[0]).result(10)
    assert not ranker.schedule.unfinished
