"""Where executors' threads run: fake machines as folders, properties of every plan, and real threads pinned."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd import Ranker, RankRequest
from rankd.config import read_config
from rankd.engine import backend, thread_plan
from rankd.engine.backend import EngineConfig, Pinning, Precision, plan_threads
from rankd.engine.thread_plan import ThreadPlan, apply, default_executors, plan, unpinned
from rankd.engine.topology import Core, Topology, cpus_text, parse_cpus, quota_cpus, read_topology
from rankd.serve.settings import ServeConfig

ON_LINUX = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are pinned on Linux alone")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def lay_out(root: Path, nodes: Sequence[Sequence[str]], allowed: str = "", cgroup: str = "0::/") -> Path:
    """A machine's files: for each node the cpus of each of its cores; all are allowed by default."""
    everything = parse_cpus(",".join(core for cores in nodes for core in cores))
    write(root / "sys/devices/system/cpu/online", cpus_text(everything))
    for number, cores in enumerate(nodes):
        write(root / f"sys/devices/system/node/node{number}/cpulist", cpus_text(parse_cpus(",".join(cores))))
        for core in cores:
            for cpu in parse_cpus(core):
                write(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", core)
    write(root / "proc/self/status", f"Name:\trankd\nCpus_allowed_list:\t{allowed or cpus_text(everything)}")
    write(root / "proc/self/cgroup", cgroup)
    return root


def two_sockets(root: Path, allowed: str = "") -> Topology:
    """2 sockets x 4 cores x 2 cpus, numbered as Linux does: the siblings come after all cores."""
    return read_topology(lay_out(root, [[f"{c},{c + 8}" for c in range(s, s + 4)] for s in (0, 4)], allowed))


def texts(threads: ThreadPlan) -> list[str | None]:
    return [None if cpus is None else cpus_text(cpus) for cpus in threads.cpus]


def test_two_sockets(tmp_path: Path) -> None:
    machine = two_sockets(tmp_path)
    assert (len(machine.cores), machine.num_nodes, machine.narrowed) == (8, 2, False)
    assert default_executors(machine) == 8  # physical cores
    whole = plan(machine, 0, threads=1)
    assert texts(whole) == ["0,8", "4,12", "1,9", "5,13", "2,10", "6,14", "3,11", "7,15"]
    assert texts(plan(machine, 3, threads=1)) == ["0-1,8-9", "4-7,12-15", "2-3,10-11"]
    assert texts(plan(machine, 4, threads=2)) == ["0-1,8-9", "4-5,12-13", "2-3,10-11", "6-7,14-15"]
    assert texts(plan(machine, 1, threads=1)) == ["0-3,8-11"]
    assert texts(whole.by_node()) == ["0-3,8-11", "4-7,12-15"] * 4
    described = plan(machine, 3, threads=1).by_node().describe()
    assert described == (
        "engine threads: 2 NUMA nodes, 16 of 16 cpus allowed: executors 0,2 on cpus 0-3,8-11; 1 on cpus 4-7,12-15"
    )


def test_more_executors_than_cores_take_turns(tmp_path: Path) -> None:
    shared = texts(plan(two_sockets(tmp_path), 10, threads=1))
    assert shared == ["0,8", "4,12", "1,9", "5,13", "2,10", "6,14", "3,11", "7,15", "0,8", "4,12"]
    assert texts(plan(two_sockets(tmp_path), 4, threads=3)) == [
        "0-2,8-10",
        "4-6,12-14",
        "0-1,3,8-9,11",
        "4-5,7,12-13,15",
    ]


def test_threads_that_fill_a_node_or_exceed_it(tmp_path: Path) -> None:
    machine = two_sockets(tmp_path)
    assert texts(plan(machine, 2, threads=8)) == ["0-3,8-11", "4-7,12-15"]
    assert texts(plan(machine, 2, threads=9)) == ["0-15", "0-15"]
    assert texts(plan(machine, 1, threads=99)) == ["0-15"]


def test_one_node_is_left_to_the_kernel(tmp_path: Path) -> None:
    machine = read_topology(lay_out(tmp_path, [["0", "1", "2", "3"]]))
    assert plan(machine, 0, threads=1) == unpinned(4, "one NUMA node, no cpuset")
    assert plan(machine, 2, threads=4).describe() == "engine threads: nothing pinned: one NUMA node, no cpuset"


def test_a_cpuset_of_three_cpus_over_two_nodes(tmp_path: Path) -> None:
    machine = two_sockets(tmp_path, allowed="2,4,12")  # a core of node 0, both cpus of a core of node 1
    assert (machine.narrowed, default_executors(machine)) == (True, 2)
    assert texts(plan(machine, 0, threads=1)) == ["2", "4,12"]
    assert texts(plan(machine, 3, threads=1)) == ["2", "4,12", "2"]
    assert texts(plan(machine, 2, threads=2)) == ["4,12", "4,12"]  # node 0 has no cpu for a second thread
    assert texts(plan(machine, 1, threads=3)) == ["2,4,12"]
    assert "2 NUMA nodes, 3 of 16 cpus allowed" in plan(machine, 0, threads=1).describe()


def test_a_cpuset_on_one_node(tmp_path: Path) -> None:
    machine = read_topology(lay_out(tmp_path, [["0", "1", "2", "3"]], allowed="1-3,7"))
    assert texts(plan(machine, 0, threads=1)) == ["1", "2", "3"]
    assert texts(plan(machine, 0, threads=1).by_node()) == ["1-3"] * 3


SIXTY_FOUR = [[str(cpu) for cpu in range(64)]]


def test_a_quota_limits_executors_and_pins_nothing(tmp_path: Path) -> None:
    lay_out(tmp_path, SIXTY_FOUR, cgroup="0::/kubepods/pod1/box")
    write(tmp_path / "sys/fs/cgroup/kubepods/pod1/box/cpu.max", "max 100000")
    write(tmp_path / "sys/fs/cgroup/kubepods/pod1/cpu.max", "250000 100000")  # of the cgroup above
    write(tmp_path / "sys/fs/cgroup/kubepods/cpu.max", "6000000 100000")
    machine = read_topology(tmp_path)
    assert (machine.quota_cpus, machine.narrowed, default_executors(machine)) == (2.5, False, 2)
    assert plan(machine, 0, threads=1) == unpinned(2, "one NUMA node, no cpuset, a quota of 2.5 cpus")
    assert plan(machine, 5, threads=1).num_executors == 5  # a configured number stands


@pytest.mark.parametrize(("quota", "cpus", "executors"), [("250000", 2.5, 2), ("-1", None, 64), ("50000", 0.5, 1)])
@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct"])
def test_a_quota_of_cgroup_version_1(
    tmp_path: Path, folder: str, quota: str, cpus: float | None, executors: int
) -> None:
    lay_out(tmp_path, SIXTY_FOUR, cgroup="5:memory:/box\n3:cpu,cpuacct:/box\n1:name=systemd:/\n0::/")
    write(tmp_path / f"sys/fs/cgroup/{folder}/box/cpu.cfs_quota_us", quota)
    write(tmp_path / f"sys/fs/cgroup/{folder}/box/cpu.cfs_period_us", "100000")
    machine = read_topology(tmp_path)
    assert (machine.quota_cpus, default_executors(machine)) == (cpus, executors)


@pytest.mark.parametrize("path", ["/docker/0123abc", "/../../system.slice/box", "/"])
def test_a_container_that_sees_the_path_outside_has_its_quota_at_the_root(tmp_path: Path, path: str) -> None:
    write(tmp_path / "proc/self/cgroup", f"4:cpu,cpuacct:{path}")
    write(tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "400000")
    write(tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    assert quota_cpus(tmp_path) == 4.0


@pytest.mark.parametrize("text", ["", "max", "max 100000", "0 100000", "100000 0", "many 100000", "-1 100000"])
def test_a_quota_that_says_nothing_is_none(tmp_path: Path, text: str) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/")
    write(tmp_path / "sys/fs/cgroup/cpu.max", text)
    assert quota_cpus(tmp_path) is None


def test_without_the_files_nothing_is_pinned(tmp_path: Path) -> None:
    machine = read_topology(tmp_path / "nothing")
    assert machine.num_nodes == 1
    assert machine.allowed
    assert plan(machine, 3, threads=1).cpus == (None, None, None)


def test_nodes_that_leave_cpus_out_are_no_nodes(tmp_path: Path) -> None:
    two_sockets(tmp_path)
    (tmp_path / "sys/devices/system/node/node1/cpulist").unlink()
    machine = read_topology(tmp_path)
    assert (machine.num_nodes, len(machine.allowed)) == (1, 16)
    assert plan(machine, 0, threads=1).cpus == (None,) * 8


def test_without_siblings_every_cpu_is_a_core_and_nodes_of_memory_do_not_count(tmp_path: Path) -> None:
    lay_out(tmp_path, [["0", "1"], [], ["2", "3"]])
    for file in tmp_path.rglob("thread_siblings_list"):
        file.unlink()
    machine = read_topology(tmp_path)
    assert (machine.num_nodes, default_executors(machine)) == (2, 4)
    assert texts(plan(machine, 2, threads=1)) == ["0-1", "2-3"]


def test_offline_cpus_are_neither_allowed_nor_missed(tmp_path: Path) -> None:
    lay_out(tmp_path, [["0,2", "1,3"]], allowed="0-127")
    write(tmp_path / "sys/devices/system/cpu/online", "0-2")
    machine = read_topology(tmp_path)
    assert (machine.narrowed, sorted(machine.allowed)) == (False, [0, 1, 2])
    assert [sorted(core.cpus) for core in machine.cores] == [[0, 2], [1]]


@given(st.frozensets(st.integers(0, 200)))
def test_lists_of_cpus_are_read_as_written(cpus: frozenset[int]) -> None:
    assert parse_cpus(cpus_text(cpus)) == cpus


@st.composite
def machines(draw: st.DrawFn) -> Topology:
    """Up to four nodes of different size, cores of one or two cpus, any cpuset, any quota."""
    cores, cpu = [], 0
    for node, sizes in enumerate(draw(st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=6), max_size=4))):
        for size in sizes:
            cores.append(Core(node, frozenset(range(cpu, cpu + size))))
            cpu += size
    everything = sorted(frozenset().union(*(core.cpus for core in cores)))
    if not everything:
        return Topology((Core(0, frozenset({0})),), frozenset({0}))
    allowed = draw(st.just(everything) | st.lists(st.sampled_from(everything), min_size=1))
    return Topology(tuple(cores), frozenset(allowed), draw(st.none() | st.floats(0.1, 30)))


@given(machines(), st.integers(0, 20), st.integers(1, 20))
def test_every_plan(machine: Topology, executors: int, threads: int) -> None:
    made = plan(machine, executors, threads)
    assert made.num_executors == len(made.nodes) == (executors or default_executors(machine))
    if machine.num_nodes == 1 and not machine.narrowed:
        assert set(made.cpus) == {None}
        return
    nodes: dict[int, list[frozenset[int]]] = {}
    for core in machine.allowed_cores:
        nodes.setdefault(core.node, []).append(core.cpus)
    wholes = {node: frozenset().union(*cores) for node, cores in nodes.items()}
    large = [node for node, whole in wholes.items() if len(whole) >= threads]
    dealt: Counter[int] = Counter()
    turns: Counter[frozenset[int]] = Counter()
    for cpus, home in zip(made.cpus, made.nodes, strict=True):
        assert cpus is not None
        assert home is not None
        assert cpus <= home <= machine.allowed
        on = [node for node, whole in wholes.items() if cpus & whole]
        if large:
            (node,) = on
            dealt[node] += 1
            assert home == wholes[node]
            its = [core for core in nodes[node] if core & cpus]
            assert cpus == frozenset().union(*its)  # whole cores, as far as they are allowed
            assert len(its) >= min(threads, len(nodes[node]))
            turns.update(its)
        else:
            assert cpus == home == frozenset().union(*(wholes[node] for node in on))
            assert len(cpus) >= threads or cpus == machine.allowed
    for node in dealt:  # on a node no core is lost, and none serves two executors more than another
        shares = [turns[core] for core in nodes[node]]
        assert 1 <= max(shares) <= min(shares) + 1
    for one in large:  # among nodes, nobody would have more cores on another one
        for other in large:
            assert dealt[one] == 0 or len(nodes[one]) / dealt[one] >= len(nodes[other]) / (dealt[other] + 1)


@given(machines())
def test_the_default_number_of_executors(machine: Topology) -> None:
    number = default_executors(machine)
    assert 1 <= number <= max(1, len(machine.allowed_cores))
    assert machine.quota_cpus is None or number <= max(1, machine.quota_cpus)


@ON_LINUX
def test_apply_pins_the_calling_thread_and_no_other() -> None:
    before = os.sched_getaffinity(0)
    one = frozenset({max(before)})
    seen: dict[str, set[int]] = {}
    pinned, looked = threading.Event(), threading.Event()

    def pinning() -> None:
        apply(ThreadPlan((None, one), (None, one), "a test"), 1)
        seen["pinned"] = os.sched_getaffinity(0)
        pinned.set()
        looked.wait(10)

    def free() -> None:
        pinned.wait(10)
        apply(ThreadPlan((None, one), (None, one), "a test"), 0)
        seen["free"] = os.sched_getaffinity(0)
        looked.set()

    threads = [threading.Thread(target=work) for work in (pinning, free)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"pinned": set(one), "free": before}
    assert os.sched_getaffinity(0) == before


@ON_LINUX
def test_cpus_that_vanished_are_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_plan, "_said", set())
    before, gone = os.sched_getaffinity(0), frozenset({5000, 5001})
    with caplog.at_level(logging.WARNING, "rankd"):
        for executor in (0, 1):
            apply(ThreadPlan((gone, gone), (gone, gone), "a test"), executor)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "threads stay unpinned, cpus 5000-5001 are not to be had"
    ]
    assert os.sched_getaffinity(0) == before


def test_nothing_happens_where_threads_cannot_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    apply(ThreadPlan((frozenset({0}),), (frozenset({0}),), "a test"), 0)


def test_the_configuration_says_auto_or_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine = two_sockets(tmp_path)
    monkeypatch.setattr(backend, "read_topology", lambda: machine)
    settings = read_config(ServeConfig, environment={"RANKD_ENGINE__PINNING": "off"})
    assert settings.engine.pinning is Pinning.OFF
    with caplog.at_level(logging.INFO, "rankd"):
        assert plan_threads(settings.engine) == unpinned(8, 'engine.pinning is "off"')
        assert texts(plan_threads(EngineConfig(executors=2))) == ["0-3,8-11", "4-7,12-15"]
        assert texts(plan_threads(EngineConfig(executors=3), by_node=True))[2] == "0-3,8-11"
    assert [record.getMessage() for record in caplog.records][:2] == [
        'engine threads: nothing pinned: engine.pinning is "off"',
        "engine threads: 2 NUMA nodes, 16 of 16 cpus allowed: executors 0 on cpus 0-3,8-11; 1 on cpus 4-7,12-15",
    ]


@ON_LINUX
@pytest.mark.parametrize("executors", [2, 3])
def test_a_ranker_on_two_nodes_computes_as_on_one(
    demo_models: Path, monkeypatch: pytest.MonkeyPatch, executors: int
) -> None:
    """Two cpus of this machine passed off as two nodes: OpenVINO's graphs are compiled on each, scores are the same."""
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) < 2:
        pytest.skip("needs two cpus")
    config = EngineConfig(target="openvino", precision=Precision.FP32, executors=executors)
    with Ranker.load(demo_models / "demo", config) as ranker:
        requests = [RankRequest(user, ranker.catalogue.ids.items[:40]) for user in ranker.catalogue.ids.users[:6]]
        expected = [ranker.rank(request).scores for request in requests]
    machine = Topology(tuple(Core(node, frozenset({mine[node]})) for node in (0, 1)), frozenset(mine[:2]))
    monkeypatch.setattr(backend, "read_topology", lambda: machine)
    with Ranker.load(demo_models / "demo", config) as ranker:
        futures = [ranker.submit(request) for request in requests * 2]
        for scores, future in zip(expected * 2, futures, strict=True):
            np.testing.assert_allclose(future.result().scores, scores, atol=1e-4)
        cpus = {
            int(thread.name.rpartition("-")[2]): os.sched_getaffinity(thread.native_id or 0)
            for thread in threading.enumerate()
            if thread.name.startswith("demo-executor-")
        }
    assert cpus == {number: {mine[number % 2]} for number in range(executors)}
    assert os.sched_getaffinity(0) == set(mine)
