"""All agents of a deployment, through Ray: each in a placement group of its own, which reserves its place.

Groups are asked for together before any process starts: a change finds room for all of its processes, or changes
nothing. Replicas of a shard go to different nodes where that can be.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import msgspec
import ray
from ray import PlacementGroupID
from ray.experimental import internal_kv
from ray.util import list_named_actors, placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup, get_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rankd.deploy.agent import Agent
from rankd.deploy.deployment import Watching
from rankd.deploy.deployment_record import DeploymentRecord, Wanted
from rankd.deploy.process_report import ProcessReport, Reports
from rankd.errors import Unavailable
from rankd.plan.byte_sizes import show_bytes
from rankd.shards.placement_file import Placement

CONTROLLER = "controller"
NAMESPACE = "rankd-"
APART_S = 1.0
"""How long Ray may look for room apart from replicas."""
CALL_S = 3.0
"""How long an agent may take to say how it is."""

log = logging.getLogger("rankd")


class RayFleet:
    """The agents of deployment `name`; this process is connected to Ray."""

    def __init__(self, name: str, watching: Watching) -> None:
        self._name, self._watching = name, watching
        self.namespace = NAMESPACE + name

    def save(self, record: DeploymentRecord) -> None:
        """Keep a record as long as Ray keeps its actors."""
        internal_kv._internal_kv_put(self._key, msgspec.json.encode(record), overwrite=True)

    def load(self) -> DeploymentRecord | None:
        """The record that was kept; None if there is none."""
        found = internal_kv._internal_kv_get(self._key)
        return None if found is None else msgspec.json.decode(found, type=DeploymentRecord)

    def end_all(self) -> bool:
        """End all processes that are left, give up all places, and keep the record no more; whether there was any.

        The record goes first, so that no later `up` takes it for its own when the rest fails; and once more last, as
        a controller that is being killed may have kept it again.
        """
        recorded, names = bool(internal_kv._internal_kv_del(self._key)), sorted(self.names())
        self.stop(names, self._watching.drain_seconds)
        groups = self._remove_groups(lambda group: group.startswith(self._group_name("")))
        internal_kv._internal_kv_del(self._key)
        return bool(recorded or names or groups)

    def names(self) -> set[str]:
        """Processes that have an agent, also one that Ray is moving."""
        found = list_named_actors(all_namespaces=True)
        return {one["name"] for one in found if one["namespace"] == self.namespace and one["name"] != CONTROLLER}

    def nodes(self) -> dict[str, str]:
        """The addresses of the nodes that are there, by their ids."""
        return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}

    def start(self, wanted: Collection[Wanted]) -> None:
        """Start processes, all or none.

        Raises:
            Unavailable: there is no room for all of them.
        """
        groups: dict[str, PlacementGroup] = {}
        try:
            for one in wanted:
                groups[one.name] = self._find_room(one, wanted)
        except BaseException:
            for group in groups.values():
                remove_placement_group(group)
            raise
        for one in wanted:
            self._start_agent(one, groups[one.name])

    def reports(self, names: Collection[str]) -> Reports:
        """What the agents that answer say: of their processes, and which placement they were told."""
        found: dict[str, tuple[ProcessReport, int]] = {}
        self._call(names, lambda agent: agent.report.remote(), CALL_S, found.__setitem__)
        return found

    def tell(self, names: Collection[str], placement: Placement) -> None:
        """Tell ranking servers where the tables are; those that do not answer are told again by `Controller`."""
        self._call(names, lambda agent: agent.place.remote(placement), CALL_S)

    def stop(self, names: Collection[str], drain_seconds: float) -> None:
        """End processes at the same time, each with so long to finish; their agents and places go too."""
        self._call(names, lambda agent: agent.stop.remote(drain_seconds), drain_seconds + CALL_S)
        for name in names:
            agent = self._agent(name)
            if agent is not None:
                ray.kill(agent, no_restart=True)
            self._release(name)

    @property
    def _key(self) -> bytes:
        return f"rankd-deployment:{self._name}".encode()

    def _call(
        self,
        names: Iterable[str],
        call: Callable[[Any], Any],
        within_s: float,
        take: Callable[[str, Any], None] = lambda name, answer: None,
    ) -> None:
        """Call agents at the same time and take what those answer that do in time."""
        agents = {name: self._agent(name) for name in names}
        asked: Mapping[Any, str] = {call(agent): name for name, agent in agents.items() if agent is not None}
        if not asked:
            return
        ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=within_s)
        for answer in ready:
            try:
                take(asked[answer], ray.get(answer))
            except ray.exceptions.RayError as error:
                log.warning("%s did not do what it was asked: %s", asked[answer], error)
        for answer in late:
            log.warning("%s did not answer within %g s", asked[answer], within_s)

    def _agent(self, name: str) -> Any | None:
        try:
            return ray.get_actor(name, namespace=self.namespace)
        except ValueError:
            return None

    def _group_name(self, name: str) -> str:
        return f"{self.namespace}/{name}"

    def _find_room(self, one: Wanted, wanted: Collection[Wanted]) -> PlacementGroup:
        """A place for a process, apart from its replicas if there is one."""
        replicas = {node for name in one.apart_from if (node := self._node_of(name))}
        apart = one.avoid | replicas
        if replicas and set(self.nodes()) - apart:
            group = self._reserve(one, apart)
            if group.wait(APART_S):
                return group
        group = self._reserve(one, one.avoid)
        if group.wait(self._watching.room_seconds):
            return group
        remove_placement_group(group)
        raise Unavailable(_no_room(wanted, one))

    def _reserve(self, one: Wanted, avoid: Collection[str]) -> PlacementGroup:
        self._release(one.name)
        bundle = {"CPU": one.needs.cpus, "memory": float(one.needs.memory_bytes)}
        labels = {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"} if avoid else {}
        return placement_group(
            [{kind: amount for kind, amount in bundle.items() if amount}],
            name=self._group_name(one.name),
            lifetime="detached",
            bundle_label_selector=[labels],
        )

    def _node_of(self, name: str) -> str:
        """The node on which a process has its place; empty if it has none."""
        try:
            group = get_placement_group(self._group_name(name))
        except ValueError:
            return ""
        return str(placement_group_table(group)["bundles_to_node_id"].get(0, ""))

    def _release(self, name: str) -> None:
        self._remove_groups(self._group_name(name).__eq__)

    def _remove_groups(self, ours: Callable[[str], bool]) -> int:
        """Remove placement groups by their ids, which hold in all namespaces; how many."""
        found = [
            PlacementGroup(PlacementGroupID(bytes.fromhex(key)))
            for key, group in placement_group_table().items()
            if group["state"] != "REMOVED" and ours(group["name"])
        ]
        for group in found:
            remove_placement_group(group)
        return len(found)

    def _start_agent(self, wanted: Wanted, group: PlacementGroup) -> None:
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        options: dict[str, Any] = {
            "name": wanted.name,
            "namespace": self.namespace,
            "lifetime": "detached",
            "max_restarts": -1,
            "max_concurrency": 4,
            "num_cpus": wanted.needs.cpus,
            "memory": wanted.needs.memory_bytes,
            "scheduling_strategy": place,
        }
        ray.remote(Agent).options(**options).remote(wanted.role, self._watching)


def _no_room(wanted: Collection[Wanted], first: Wanted) -> str:
    free = ray.available_resources()
    but = " outside of the node that is drained" if first.avoid else ""
    return (
        f"no room for {first.name}{but}: it is one of {len(wanted)} processes to be started, and reserves "
        f"{first.needs.cpus:g} CPUs and {show_bytes(first.needs.memory_bytes)} on one node; free on all nodes are "
        f"{free.get('CPU', 0):g} CPUs and {show_bytes(free.get('memory', 0))}. Add nodes, or reserve less: cpus and "
        "memory of `shard` and `server`"
    )
