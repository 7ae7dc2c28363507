"""What is to be deployed: the TOML file of `rankd deploy up`.

    name = "shop"
    models = "models"                      # of the ranking servers
    plan = "plan.json"                     # of `rankd plan`
    tables = "models/shop/1/embeddings"    # of the shards: whole tables, or parts from `rankd shard split`
    replicas = 2                           # processes for each shard
    servers = 2                            # ranking servers

Paths are relative to the file; `models` and `tables` have to be there on every node.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from rankd.config import read_struct
from rankd.errors import ConfigError
from rankd.plan.byte_sizes import read_bytes
from rankd.shards.shard_config import ShardSecurity

_Positive = Annotated[float, Meta(gt=0)]
_Port = Annotated[int, Meta(ge=0, le=65535)]
Ports = tuple[_Port, _Port]
"""The first and the last that may be taken; 0 and 0: any that is free."""


class ShardNeeds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A shard: what it reserves on its node. Its tables come on top of `memory`. `workers` threads look up; `config` is
    a file for `rankd shard serve`."""

    cpus: Annotated[float, Meta(ge=0)] = 1.0
    memory: str = "512MiB"
    ports: Ports = (0, 0)
    workers: Annotated[int, Meta(ge=1)] = 2
    config: str = ""


class ServerNeeds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ranking server: what it reserves on its node. HTTP takes the first port of `ports` that is free with the one
    above it, which is for gRPC. `config` is a file for `rankd serve`, without plan and shards."""

    cpus: Annotated[float, Meta(ge=0)] = 1.0
    memory: str = "2GiB"
    ports: Ports = (8000, 8099)
    config: str = ""


class Watching(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A process is asked every `every_seconds` and has `answer_seconds`; after `misses` in a row it is killed and
    started again. It has `start_seconds` until it answers for the first time, and `drain_seconds` to finish. Ray has
    `room_seconds` to find a place for each; more where nodes are added when they are needed."""

    every_seconds: _Positive = 0.5
    answer_seconds: _Positive = 1.0
    misses: Annotated[int, Meta(ge=1)] = 3
    start_seconds: _Positive = 120.0
    drain_seconds: _Positive = 30.0
    room_seconds: _Positive = 10.0


class Deployment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file. `security` is between servers and shards: without one a secret is made up."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,60}[a-z0-9])?$")]
    models: str
    plan: str
    tables: str
    replicas: Annotated[int, Meta(ge=1)] = 1
    servers: Annotated[int, Meta(ge=0)] = 1
    shard: ShardNeeds = ShardNeeds()
    server: ServerNeeds = ServerNeeds()
    watch: Watching = Watching()
    security: ShardSecurity = ShardSecurity()


def read_deployment(path: Path) -> Deployment:
    """A deployment whose paths are absolute and there, and whose values make sense.

    Raises:
        ConfigError: unreadable, an unknown key or a bad value, or a path that is not there.
    """
    found = read_struct(Deployment, path)
    folder = path.resolve().parent
    for what, value in (("shard.memory", found.shard.memory), ("server.memory", found.server.memory)):
        _check(path, what, value)
    for what, (first, last) in (("shard.ports", found.shard.ports), ("server.ports", found.server.ports)):
        if first > last:
            raise ConfigError(f"{path}: {what} is [{first}, {last}]; give the first port and the last")

    def there(what: str, given: str) -> str:
        full = folder / given
        if given and not full.exists():
            raise ConfigError(f"{path}: {what} is '{given}', and there is no {full}")
        return str(full) if given else ""

    return replace(
        found,
        models=there("models", found.models),
        plan=there("plan", found.plan),
        tables=there("tables", found.tables),
        shard=replace(found.shard, config=there("shard.config", found.shard.config)),
        server=replace(found.server, config=there("server.config", found.server.config)),
    )


def _check(path: Path, what: str, size: str) -> None:
    try:
        read_bytes(size)
    except ConfigError as error:
        raise ConfigError(f"{path}: {what}: {error}") from error
