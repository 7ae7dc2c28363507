"""Where a server's embedding tables are: in its own process, on the shards of a plan, or where a placement has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from rankd.embeddings.model_tables import open_model_tables
from rankd.embeddings.pooling import TableSource
from rankd.errors import ConfigError
from rankd.plan.plan_file import PlanFile, read_plan
from rankd.shards.live_tables import LiveTables
from rankd.shards.placed_tables import PlacedTables
from rankd.shards.placement_file import Placement
from rankd.shards.planned_shards import layout_of
from rankd.shards.shard_config import ShardClientConfig, SumFormat
from rankd.shards.sharded_pooling import ShardedPooling

REPLICAS = "|"


class TableConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`threads` look up in tables of this process. `plan` is a file of `rankd plan`; `shards` are the addresses of its
    shards, in their order, "host:port", of replicas "host:port|host:port". In place of both, `placement` is a file that
    has both and may be replaced while the server runs. The server is ready when each shard can be asked, which has
    `start_seconds`. `client`: how shards are asked."""

    threads: Annotated[int, Meta(ge=1)] = 1
    plan: str = ""
    shards: tuple[str, ...] = ()
    placement: str = ""
    start_seconds: Annotated[float, Meta(gt=0)] = 30.0
    client: ShardClientConfig = ShardClientConfig()


def sums_in(narrow: bool) -> SumFormat:
    """What AUTO is for an engine that computes in bfloat16, or does not."""
    return SumFormat.BF16 if narrow else SumFormat.FP32


def with_sums(config: TableConfig, narrow: bool) -> TableConfig:
    """The same with the format of sums chosen, if it is not said, for an engine that computes in bfloat16 (`narrow`) or
    does not."""
    if config.client.sums is not SumFormat.AUTO:
        return config
    return msgspec.structs.replace(config, client=msgspec.structs.replace(config.client, sums=sums_in(narrow)))


def open_tables(version: Path, widths: Mapping[str, int], config: TableConfig) -> TableSource | None:
    """The tables that a model version reads beside its graph, by name with their widths; None if there are none.

    Raises:
        ArtifactError: tables of this process that are missing or damaged.
        ConfigError: a plan that is of other tables, or does not fit the addresses; a plan and a placement.
        ShardFailure: a shard cannot be asked in time.
    """
    if not widths:
        return None
    if config.placement:
        return _follow_placement(version, widths, config)
    if not config.plan:
        return open_model_tables(version, widths, config.threads)
    addresses = [shard.split(REPLICAS) for shard in config.shards]
    placed = _open_placed(version, widths, config, read_plan(Path(config.plan)), addresses)
    try:
        placed.wait_up(config.start_seconds)
    except BaseException:
        placed.close()
        raise
    return placed


def _follow_placement(version: Path, widths: Mapping[str, int], config: TableConfig) -> LiveTables:
    if config.plan or config.shards:
        raise ConfigError(
            "tables.placement names a file that has a plan and its shards, and tables.plan or tables.shards are given "
            "too; give the one or the others"
        )

    def open_one(placement: Placement) -> TableSource:
        return _open_placed(version, widths, config, placement.plan, placement.shards)

    return LiveTables(Path(config.placement), open_one, config.start_seconds)


def _open_placed(
    version: Path, widths: Mapping[str, int], config: TableConfig, file: PlanFile, addresses: Sequence[Sequence[str]]
) -> TableSource:
    """Tables where a plan has them, connecting to its shards; `wait_up` waits for that."""
    _check_tables(file, widths, config.placement or config.plan)
    replicated = {name: widths[name] for name in file.plan.replicated}
    if not file.plan.shards:
        return open_model_tables(version, widths, config.threads)
    layout = layout_of(file, addresses)
    sharded = ShardedPooling(layout, config.client, {hot.table: hot.rows for hot in file.plan.hot_rows})
    here = open_model_tables(version, replicated, config.threads)
    sharded.start()
    return PlacedTables(here, layout, sharded)


def _check_tables(file: PlanFile, widths: Mapping[str, int], source: str) -> None:
    planned = {table.name: table.dim for table in file.plan.tables}
    if planned != dict(widths):
        raise ConfigError(
            f"{source} is of the tables {_said(planned)}; the model reads {_said(widths)}: plan again for this model"
        )


def _said(widths: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({dim})" for name, dim in sorted(widths.items())) or "none"
