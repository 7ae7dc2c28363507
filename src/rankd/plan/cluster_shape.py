"""How many servers are main ones, and how many have the same shard."""

from __future__ import annotations

from dataclasses import dataclass

from rankd.plan.cost_model import CostModel
from rankd.plan.request_work import RequestWork
from rankd.plan.table_plan import Plan


@dataclass(frozen=True, slots=True)
class ClusterShape:
    """Main servers, and servers with each shard; one of each at least."""

    mains: int
    replicas: tuple[int, ...]

    @property
    def servers(self) -> int:
        """All of them."""
        return self.mains + sum(self.replicas)

    def cores(self, costs: CostModel) -> int:
        """All of them; those of the machine, if all servers share one."""
        if costs.machine_cores is not None:
            return costs.machine_cores
        return self.mains * costs.main_cores + sum(self.replicas) * costs.shard_cores

    def size_bytes(self, plan: Plan) -> int:
        """Of tables in all servers."""
        shards = sum(count * size for count, size in zip(self.replicas, plan.shard_bytes, strict=True))
        return self.mains * plan.main_bytes + shards


def smallest_shape(plan: Plan) -> ClusterShape:
    """One server of each kind."""
    return ClusterShape(1, (1,) * len(plan.shards))


def spread_servers(work: RequestWork, num_shards: int, servers: int, costs: CostModel) -> ClusterShape | None:
    """So many servers, given one by one to whichever kind is the busiest; None if they are fewer than kinds.

    No other division has a smaller busiest share.
    """
    counts = [1] * (1 + num_shards)
    if servers < len(counts):
        return None
    samples = costs.mean_samples
    loads = [work.main_us.at(samples) / costs.main_cores] + [0.0] * num_shards
    for call in work.calls:
        loads[1 + call.shard] += call.serve_us.at(samples) / costs.shard_cores
    for _ in range(servers - len(counts)):
        counts[max(range(len(counts)), key=lambda kind: loads[kind] / counts[kind])] += 1
    return ClusterShape(counts[0], tuple(counts[1:]))
