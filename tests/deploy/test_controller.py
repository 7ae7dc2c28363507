"""Changes of a deployment: new before old, nobody asks what has ended, and what fails changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.deploy import controller as controller_module
from rankd.deploy.controller import Controller
from rankd.deploy.deployment import Deployment, Watching
from rankd.deploy.deployment_record import DeploymentRecord
from rankd.errors import ConfigError, NotFound, Unavailable
from rankd.plan.plan_file import FORMAT, PlanFile
from rankd.plan.strategies import make_plan
from rankd.plan.table_plan import MemoryLimits, Strategy
from tests.deploy.fake_fleet import NODES, FakeFleet
from tests.plan.made_up import load_of

LOADS = [load_of("item", 101), load_of("user", 40)]


def planned(num_shards: int, tables: int = 2) -> PlanFile:
    plan = make_plan(Strategy.LOAD_BALANCED, LOADS[:tables], num_shards, MemoryLimits(replicate_bytes=0))
    assert len(plan.shards) == num_shards
    return PlanFile(FORMAT, "films", (), plan)


PLANS = {number: planned(number) for number in (1, 2, 4)}


@pytest.fixture(autouse=True, scope="module")
def no_pauses() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(controller_module, "LOOK_S", 0.001)
        yield


def deployment(replicas: int = 1, servers: int = 1) -> Deployment:
    watching = Watching(start_seconds=0.02)
    return Deployment("films", "models", "plan.json", "tables", replicas, servers, watch=watching)


def started(shards: int = 2, replicas: int = 1, servers: int = 1) -> tuple[Controller, FakeFleet]:
    fleet = FakeFleet()
    controller = Controller(DeploymentRecord(deployment(replicas, servers), PLANS[shards]), fleet)
    controller.up()
    return controller, fleet


def kinds(fleet: FakeFleet) -> Counter[str]:
    """How many processes of each kind run."""
    return Counter(name.rpartition("-")[0] for name in fleet.running)


def test_shards_are_up_before_ranking_servers_start() -> None:
    _, fleet = started(2, replicas=2, servers=2)
    assert fleet.events == [
        *(f"start shard-{shard}-{number}" for shard, number in ((0, 1), (0, 2), (1, 3), (1, 4))),
        "start server-5",
        "start server-6",
    ]
    own = fleet.addresses
    expected = ((own["shard-0-1"], own["shard-0-2"]), (own["shard-1-3"], own["shard-1-4"]))
    assert {fleet.told[name].shards for name in ("server-5", "server-6")} == {expected}
    assert fleet.nodes_of["shard-0-1"] != fleet.nodes_of["shard-0-2"]
    assert fleet.nodes_of["server-5"] != fleet.nodes_of["server-6"]


def test_another_plan_starts_beside_the_old_one_which_ends_when_nobody_asks_it() -> None:
    controller, fleet = started(2)
    fleet.events.clear()
    controller.apply(PLANS[4])
    assert fleet.events == [
        *(f"start shard-{number}-{number + 4}" for number in range(4)),
        "tell server-3",
        "stop shard-0-1",
        "stop shard-1-2",
    ]
    assert fleet.told["server-3"].plan == PLANS[4]
    assert fleet.lost == []


def test_a_plan_of_other_tables_is_refused() -> None:
    controller, fleet = started()
    fleet.events.clear()
    with pytest.raises(ConfigError, match="is of other tables"):
        controller.apply(planned(2, tables=1))
    assert fleet.events == []


@pytest.mark.parametrize("fault", ["no room", "does not start", "does not go over"])
def test_a_change_that_fails_leaves_all_as_it_was(fault: str) -> None:
    controller, fleet = started(2)
    before, told = set(fleet.running), fleet.told["server-3"]
    fleet.events.clear()
    if fault == "no room":
        fleet.room = 6
    elif fault == "does not start":
        fleet.starts = False
    else:
        fleet.stubborn = {"server-3"}
    with pytest.raises(
        Unavailable,
        match={"does not start": "broken", "does not go over": "server-3 did not go over"}.get(fault, fault),
    ):
        controller.apply(PLANS[4])
    assert set(fleet.running) == before
    assert not {"stop shard-0-1", "stop shard-1-2"} & set(fleet.events)
    assert (fleet.told["server-3"].plan, fleet.told["server-3"].shards) == (told.plan, told.shards)
    fleet.room, fleet.starts, fleet.stubborn = 1000, True, set()
    for _ in range(4):
        controller.follow()
    assert set(fleet.running) == before
    controller.apply(PLANS[4])  # and it can be tried again
    assert kinds(fleet) == {"shard-0": 1, "shard-1": 1, "shard-2": 1, "shard-3": 1, "server": 1}


def test_up_that_fails_leaves_nothing() -> None:
    for room, starts, stubborn in ((3, True, ""), (1000, False, ""), (1000, True, "server-5")):
        fleet = FakeFleet()
        fleet.room, fleet.starts, fleet.stubborn = room, starts, {stubborn}
        controller = Controller(DeploymentRecord(deployment(2), PLANS[2]), fleet)
        with pytest.raises(Unavailable):
            controller.up()
        assert fleet.running == {}
        fleet.room, fleet.starts, fleet.stubborn = 1000, True, set()
        controller.follow()
        assert fleet.running == {}, "nothing is left in the record to be started again"


def test_scaling_starts_the_missing_and_ends_the_newest() -> None:
    controller, fleet = started(2, replicas=1, servers=1)
    controller.scale(replicas=2)
    assert kinds(fleet) == {"shard-0": 2, "shard-1": 2, "server": 1}
    assert [len(shard) for shard in fleet.told["server-3"].shards] == [2, 2]
    controller.scale(replicas=1, servers=2)
    assert kinds(fleet) == {"shard-0": 1, "shard-1": 1, "server": 2}
    assert {"shard-0-1", "shard-1-2", "server-3"} < set(fleet.running)
    controller.scale(servers=0)
    assert kinds(fleet) == {"shard-0": 1, "shard-1": 1}
    assert fleet.lost == []
    assert controller.status().change == ""


def test_a_drained_node_has_nothing_any_more() -> None:
    controller, fleet = started(2, replicas=2, servers=2)
    with pytest.raises(NotFound, match="'n' are 2 nodes"):
        controller.drain((), "n")
    controller.drain((), f"at-{NODES[1]}")
    assert {fleet.nodes_of[name] for name in fleet.running} == {NODES[0]}
    assert kinds(fleet) == {"shard-0": 2, "shard-1": 2, "server": 2}
    controller.drain(["shard-0-1"])
    assert "shard-0-1" not in fleet.running
    assert kinds(fleet)["shard-0"] == 2
    with pytest.raises(NotFound, match="no process 'shard-0-1' here"):
        controller.drain(["shard-0-1"])
    with pytest.raises(NotFound, match="'n3' are 0 nodes; there are n1 at at-n1, n2 at at-n2"):
        controller.drain((), "n3")
    assert fleet.lost == []


def test_down_ends_ranking_servers_before_their_shards() -> None:
    controller, fleet = started(1)
    fleet.events.clear()
    controller.down()
    assert fleet.events == ["stop server-2", "stop shard-0-1"]
    controller.follow()
    assert fleet.running == {}


def test_what_moves_is_in_the_next_placement_and_who_was_not_told_is_told() -> None:
    controller, fleet = started(2, servers=2)
    fleet.deaf = {"server-4"}
    fleet.move("shard-1-2")
    controller.follow()
    assert fleet.told["server-3"].shards[1] == (fleet.addresses["shard-1-2"],)
    assert fleet.told["server-4"].shards[1] != (fleet.addresses["shard-1-2"],)
    fleet.deaf = set()
    controller.follow()
    assert fleet.told["server-4"] == fleet.told["server-3"]
    fleet.events.clear()
    controller.follow()
    assert fleet.events == []


def test_what_is_gone_is_started_and_what_an_unfinished_change_has_left_is_ended() -> None:
    controller, fleet = started(2)
    kept = fleet.saved
    assert kept is not None
    fleet.running["shard-0-99"] = fleet.running["shard-0-1"]  # the controller failed while this one started
    del fleet.running["shard-1-2"]
    again = Controller(msgspec.json.decode(msgspec.json.encode(kept), type=DeploymentRecord), fleet)
    for _ in range(4):
        again.follow()
    assert set(fleet.running) == {"shard-0-1", "shard-1-2", "server-3"}
    again.apply(PLANS[1])
    assert kinds(fleet) == {"shard-0": 1, "server": 1}
    assert "shard-0-4" in fleet.running, "names go on where they were"
    del controller


Change = tuple[str, int]
CHANGES = st.one_of(
    st.tuples(st.just("replicas"), st.integers(1, 3)),
    st.tuples(st.just("servers"), st.integers(0, 3)),
    st.tuples(st.just("plan"), st.sampled_from(sorted(PLANS))),
    st.tuples(st.sampled_from(["drain", "move", "lose", "no room", "deaf", "stubborn"]), st.integers(0, 20)),
    st.tuples(st.just("node"), st.integers(0, 1)),
)


@given(st.lists(CHANGES, max_size=12))
def test_whatever_changes_all_that_is_wanted_runs_and_nobody_asks_what_has_ended(changes: list[Change]) -> None:
    controller, fleet = started(2, replicas=1, servers=1)
    shards, replicas, servers = 2, 1, 1
    for what, number in changes:
        if not fleet.running:  # the only one was lost
            controller.follow()
        names = sorted(fleet.running)
        name = names[number % len(names)]
        try:
            if what == "replicas":
                controller.scale(replicas=number)
                replicas = number
            elif what == "servers":
                controller.scale(servers=number)
                servers = number
            elif what == "plan":
                controller.apply(PLANS[number])
                shards = number
            elif what == "drain":
                controller.drain([name])
            elif what == "node":
                controller.drain((), NODES[number])
            elif what == "move":
                fleet.move(name)
            elif what == "lose":
                fleet.lose(name)
            else:
                fleet.room = 6 if what == "no room" else 1000
                fleet.deaf = {name} if what == "deaf" else set()
                fleet.stubborn = {name} if what == "stubborn" else set()
        except Unavailable:
            pass
    fleet.room, fleet.deaf, fleet.stubborn = 1000, set(), set()
    for _ in range(4):  # started, told, gone over, what is left ended
        controller.follow()
    assert kinds(fleet) == Counter(
        {f"shard-{n}": replicas for n in range(shards)} | ({"server": servers} if servers else {})
    )
    here = tuple(
        {fleet.addresses[name] for name in fleet.running if name.startswith(f"shard-{n}-")} for n in range(shards)
    )
    for placement in fleet.told.values():
        assert tuple(map(set, placement.shards)) == here
    assert fleet.lost == []
