"""The server's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec.structs import replace

from rankd.engine.backend import EngineConfig
from rankd.features.feature_config import FeatureConfig
from rankd.features.stores.store_config import redacted
from rankd.observe.tracing import TracingConfig
from rankd.schedule.elastic_config import ElasticConfig
from rankd.schedule.schedule_config import ScheduleConfig
from rankd.shards.table_config import TableConfig
from rankd.states.state_config import StateConfig


class ServeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Read from a TOML file, RANKD_* variables and flags (`config.read_config`).

    Port 0 takes a free one; `grpc_port` -1 is the one above `port`, or a free one
    where that is 0. `models` empty loads all of the folder. On SIGTERM accepted requests have `drain_seconds`.
    `histories` and `items` are Parquet files that take the place of an artifact's own. `elastic` has, by the name of a
    model, the lighter variants that may answer for it.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8000
    grpc_port: Annotated[int, msgspec.Meta(ge=-1, le=65535)] = -1
    grpc: bool = True
    models: tuple[str, ...] = ()
    max_body_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 8 << 20
    drain_seconds: Annotated[float, msgspec.Meta(gt=0)] = 20.0
    histories: str = ""
    items: str = ""
    engine: EngineConfig = EngineConfig()
    states: StateConfig = StateConfig()
    features: FeatureConfig = FeatureConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    tables: TableConfig = TableConfig()
    tracing: TracingConfig = TracingConfig()
    elastic: dict[str, ElasticConfig] = {}


def durable(config: ServeConfig, models: Path) -> ServeConfig:
    """A configuration whose events survive a restart: where no store is named, LMDB in a hidden folder of the
    models'."""
    if config.features.store.url:
        return config
    store = replace(config.features.store, url=f"lmdb:{models / '.store'}")
    return replace(config, features=replace(config.features, store=store))


def without_secrets(config: ServeConfig) -> ServeConfig:
    """A configuration that can be shown."""
    store = config.features.store
    shown = replace(store, url=redacted(store.url), password="***" if store.password else "")
    client = config.tables.client
    secret = replace(client.security, secret="***" if client.security.secret else "")
    tables = replace(config.tables, client=replace(client, security=secret))
    return replace(config, features=replace(config.features, store=shown), tables=tables)
