"""The commands of sparse shards: `rankd shard serve`, `rankd shard split`."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import click


@click.group()
def shard() -> None:
    """Serve embedding tables of a plan from a process of their own."""


@shard.command()
@click.argument("plan", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("tables", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--shard", "number", type=click.IntRange(0), required=True, help="Which of the plan's shards, from 0.")
@click.option("--host", help="The address to listen on; 127.0.0.1 by default.")
@click.option("--port", type=click.IntRange(0, 65535), help="The port; a free one by default.")
@click.option("--workers", type=click.IntRange(1), help="Threads that look up; 2 by default.")
@click.option("--config", type=click.Path(path_type=Path), help="A TOML file; flags and RANKD_* variables go over it.")
def serve(
    plan: Path, tables: Path, number: int, host: str | None, port: int | None, workers: int | None, config: Path | None
) -> None:
    """Serve one shard of a PLAN from the folder TABLES (`embeddings` of a model version, or its own parts).

    It listens on this machine alone unless a secret or certificates are configured, and drains on SIGTERM.
    """
    from rankd.config import read_config
    from rankd.plan.plan_file import read_plan
    from rankd.shards.planned_shards import identity, open_shard, served_nets
    from rankd.shards.shard_config import ShardServerConfig
    from rankd.shards.shard_server import ShardServer, serve_shard

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    flags = {"host": host, "port": port, "workers": workers}
    settings = read_config(ShardServerConfig, config, os.environ, flags)
    file = read_plan(plan)
    with open_shard(file, number, tables) as pooling:
        server = ShardServer(pooling, identity(file), served_nets(file, number), settings, pooling.contents())
        serve_shard(server, lambda address: click.echo(f"shard {number} on {address}"))


@shard.command()
@click.argument("plan", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("tables", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--shard", "number", type=click.IntRange(0), required=True, help="Which of the plan's shards, from 0.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A folder for its parts.")
def split(plan: Path, tables: Path, number: int, out: Path) -> None:
    """Write the parts of one shard of a PLAN as files of their own, to be copied to its machine."""
    from rankd.plan.plan_file import read_plan
    from rankd.shards.planned_shards import write_shard

    for path in write_shard(read_plan(plan), number, tables, out):
        click.echo(str(path))
