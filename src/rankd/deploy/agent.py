"""A supervisor as a Ray actor: Ray puts it on a node, starts it again when it fails, moves it when its node ends."""

from __future__ import annotations

from rankd.deploy.deployment import Watching
from rankd.deploy.process_report import ProcessReport
from rankd.deploy.roles import PLACEMENT, Role, ServerRole
from rankd.deploy.supervisor import Supervisor
from rankd.shards.placement_file import Placement, write_placement


class Agent:
    """One process on this node. Its methods are called from other nodes."""

    def __init__(self, role: Role, watching: Watching) -> None:
        import ray

        self._role = role
        node = ray.get_runtime_context().get_node_id()
        self._supervisor = Supervisor(role, watching, ray.util.get_node_ip_address(), node)
        self._told = role.placement.generation if isinstance(role, ServerRole) else 0
        self._supervisor.start()

    def report(self) -> tuple[ProcessReport, int]:
        """How the process is, and the generation of the last placement that it was told."""
        return self._supervisor.report(), self._told

    def place(self, placement: Placement) -> None:
        """Tell the ranking server where its tables are now.

        Raises:
            ConfigError: the file cannot be written.
        """
        write_placement(self._supervisor.folder / PLACEMENT, placement)
        self._told = placement.generation

    def stop(self, drain_seconds: float) -> None:
        """End the process, with time to finish what it has begun."""
        self._supervisor.stop(drain_seconds)
