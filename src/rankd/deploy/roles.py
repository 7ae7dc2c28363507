"""What a process of a deployment is: a shard, or a ranking server. Both are commands that a user could type.

In: a role, a folder of its own and an address. Out: the command, and someone who asks the process how it is, in its own
protocol: a process that is there but hangs does not answer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from rankd.errors import ShardFailure, Trouble, Unavailable
from rankd.plan.plan_file import PlanFile
from rankd.shards.placement_file import Placement, write_placement
from rankd.shards.planned_shards import layout_of
from rankd.shards.shard_client import ShardClient
from rankd.shards.shard_config import ShardClientConfig, ShardSecurity

PLACEMENT = "placement.json"
_GENERATION = "rankd_table_generation"


class Prober(Protocol):
    """Asks one process."""

    def probe(self, within_s: float) -> int:
        """The generation of its placement, 0 if it has none; it is well.

        Raises:
            Unavailable: it is not, or does not answer in time.
        """
        ...

    def close(self) -> None:
        """End the connection."""
        ...


class ShardRole(msgspec.Struct, frozen=True, tag="shard"):
    """Shard `number` of a plan, from the folder `tables`."""

    plan: PlanFile
    number: int
    tables: str
    workers: int
    config: str
    security: ShardSecurity
    ports: tuple[int, int]
    num_ports = 1

    def prepare(self, folder: Path) -> None:
        """Write what the command reads, anew before each start: whatever stands there then is not this plan."""
        (folder / "plan.json").write_bytes(msgspec.json.encode(self.plan))

    def command(self, folder: Path, host: str, port: int) -> list[str]:
        """What `rankd` is given."""
        command = ["shard", "serve", str(folder / "plan.json"), self.tables, "--shard", str(self.number)]
        command += ["--host", host, "--port", str(port), "--workers", str(self.workers)]
        return command + (["--config", self.config] if self.config else [])

    def variables(self, folder: Path) -> Mapping[str, str]:
        """Of its environment."""
        return _security("RANKD_SECURITY__", self.security)

    def prober(self, address: str) -> Prober:
        """Who asks it, over a connection that is kept."""
        return _ShardProber(self, address)


class ServerRole(msgspec.Struct, frozen=True, tag="server"):
    """A ranking server of the folder `models`, which follows placements, at first `placement`."""

    models: str
    config: str
    security: ShardSecurity
    ports: tuple[int, int]
    placement: Placement
    num_ports = 2

    def prepare(self, folder: Path) -> None:
        """Write what the command reads; later placements are told, and stay."""
        if not (folder / PLACEMENT).exists():
            write_placement(folder / PLACEMENT, self.placement)

    def command(self, folder: Path, host: str, port: int) -> list[str]:
        """What `rankd` is given."""
        command = ["serve", self.models, "--host", host, "--port", str(port), "--grpc-port", str(port + 1)]
        return command + (["--config", self.config] if self.config else [])

    def variables(self, folder: Path) -> Mapping[str, str]:
        """Of its environment."""
        secured = _security("RANKD_TABLES__CLIENT__SECURITY__", self.security)
        return {"RANKD_TABLES__PLACEMENT": str(folder / PLACEMENT), **secured}

    def prober(self, address: str) -> Prober:
        """Who asks it."""
        return _ServerProber(address)


Role = ShardRole | ServerRole


class _ShardProber:
    """A client of that shard alone: its handshake checks that it has this plan and these parts."""

    def __init__(self, role: ShardRole, address: str) -> None:
        places = [[address] if n == role.number else ["-"] for n in range(len(role.plan.plan.shards))]
        layout = layout_of(role.plan, places)
        shard = layout.shards[role.number]
        config = ShardClientConfig(security=role.security, longest_wait_seconds=0.2)
        self._client = ShardClient(shard, layout.plan, layout.served_by(shard), config)
        self._address = address
        self._client.start()

    def probe(self, within_s: float) -> int:
        until = time.perf_counter() + within_s
        self._client.wait_up(until)
        left_s = max(until - time.perf_counter(), 0.0)
        if self._address not in self._client.stats(left_s):
            raise ShardFailure(f"the shard at {self._address} did not answer within {within_s:g} s", Trouble.TIMEOUT)
        return 0

    def close(self) -> None:
        self._client.close()


class _ServerProber:
    """Readiness over HTTP, and the generation from /metrics."""

    def __init__(self, address: str) -> None:
        import httpx

        self._address, self._errors = address, httpx.HTTPError
        self._http = httpx.Client(base_url=f"http://{address}", trust_env=False)

    def probe(self, within_s: float) -> int:
        try:
            ready = self._http.get("/health/ready", timeout=within_s)
            if ready.status_code != 200:
                raise Unavailable(f"the server at {self._address} is not ready: {ready.text}")
            metrics = self._http.get("/metrics", timeout=within_s)
            if metrics.status_code != 200:
                raise Unavailable(f"the server at {self._address} answers {metrics.status_code} for its metrics")
            return _generation(metrics.text)
        except ValueError as error:
            raise Unavailable(f"the server at {self._address} has unreadable metrics: {error}") from error
        except self._errors as error:
            kind = type(error).__name__
            raise Unavailable(f"the server at {self._address} did not answer: {kind} {error}") from error

    def close(self) -> None:
        self._http.close()


def _generation(metrics: str) -> int:
    """The oldest generation that a model of the server still uses; 0 if none follows placements."""
    from prometheus_client.parser import text_string_to_metric_families

    found = [
        int(sample.value)
        for family in text_string_to_metric_families(metrics)
        if family.name == _GENERATION
        for sample in family.samples
    ]
    return min(found, default=0)


def _security(prefix: str, security: ShardSecurity) -> dict[str, str]:
    """In the environment, where other users of the machine do not see it, as they do arguments."""
    return {f"{prefix}{name.upper()}": str(value) for name, value in msgspec.structs.asdict(security).items() if value}
