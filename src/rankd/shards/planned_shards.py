"""From a plan's file (`plan.plan_file`) to shards: what each of them opens, and how all of them are asked.

In: the file, tables on disk, addresses. Out: a ShardLayout, and the tables of one shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import xxhash

from rankd.embeddings.local_tables import LocalTables
from rankd.embeddings.table_file import open_table, pages_for
from rankd.embeddings.table_format import SUFFIX
from rankd.embeddings.table_spec import TableSpec
from rankd.embeddings.table_writing import write_part
from rankd.errors import ArtifactError, ConfigError
from rankd.plan.declaration import WHOLE
from rankd.plan.plan_file import PlanFile
from rankd.shards.shard_layout import Net, ServedNet, Shard, ShardLayout


def identity(file: PlanFile) -> str:
    """A plan's name: two plans that place rows differently have different ones."""
    plan = file.plan
    content = msgspec.json.encode((plan.tables, plan.shards, plan.replicated, file.nets))
    return f"{file.model}-{plan.strategy.value}-{xxhash.xxh3_64_hexdigest(content)}"


def layout_of(file: PlanFile, addresses: Sequence[Sequence[str]]) -> ShardLayout:
    """The plan's shards at these addresses: for each shard those of its replicas.

    Raises:
        ConfigError: another number of shards, or a shard without an address.
    """
    plan = file.plan
    if len(addresses) != len(plan.shards):
        raise ConfigError(
            f"the plan has {len(plan.shards)} shards, and addresses of {len(addresses)} were given; give one of each"
        )
    shards = tuple(
        Shard(f"shard-{number}", tuple(own), shard.parts)
        for number, (shard, own) in enumerate(zip(plan.shards, addresses, strict=True))
    )
    sharded = {table.name: table for table in plan.tables if table.name not in plan.replicated}
    named = [(net.name, net.tables) for net in file.nets] or [(WHOLE, tuple(sharded))]
    nets = tuple(Net(name, tuple(sharded[one] for one in tables if one in sharded)) for name, tables in named)
    layout = ShardLayout(identity(file), tuple(net for net in nets if net.tables), shards)
    layout.check()
    return layout


def served_nets(file: PlanFile, number: int) -> tuple[ServedNet, ...]:
    """What shard `number` serves."""
    layout = layout_of(file, [["-"]] * len(file.plan.shards))
    return layout.served_by(layout.shards[number])


def write_shard(file: PlanFile, number: int, folder: Path, out: Path) -> list[Path]:
    """Write the parts of a shard to `out`, each a file; returns them.

    Raises:
        ConfigError: there is no such shard. ArtifactError: as `open_shard`. BuildError: a part is already there.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open_shard(file, number, folder) as tables:
        return [
            write_part(out, open_table(folder / f"{part.table}{SUFFIX}"), part)
            for part in (table.part for table in tables.tables.values())
        ]


def open_shard(file: PlanFile, number: int, folder: Path, threads: int = 1) -> LocalTables:
    """The parts of shard `number` (0..), from files of whole tables or of those parts alone.

    Raises:
        ConfigError: there is no such shard.
        ArtifactError: a table is missing, damaged, or another one than the plan's.
    """
    plan = file.plan
    if not 0 <= number < len(plan.shards):
        raise ConfigError(f"the plan has shards 0 to {len(plan.shards) - 1}; shard {number} was asked for")
    specs, parts = plan.specs, plan.shards[number].parts
    pages = pages_for(plan.shard_bytes[number])
    tables = []
    for part in parts:
        table = open_table(folder / f"{part.table}{SUFFIX}", part, pages)
        if table.spec != specs[part.table]:
            raise ArtifactError(
                f"{folder / part.table}{SUFFIX} has {_said(table.spec)}, and the plan {_said(specs[part.table])}; plan "
                "again for these tables"
            )
        tables.append(table)
    return LocalTables(tables, threads)


def _said(spec: TableSpec) -> str:
    return f"{spec.rows} rows of {spec.dim} numbers in {spec.storage.value}"
