"""A plan: which process has which rows of which tables. Strategies make it, `plan_file.py` keeps it.

Worked example, tables a (10 rows), b (4 rows), c (2 rows) on 2 shards:

    shards      [a rows 0, 2, 4, 6, 8; b]  [a rows 1, 3, 5, 7, 9]
    replicated  [c]                        every main process has all of it, no shard does
    hot_rows    [a: 1]                     every main process caches the hottest row of a, which its shard has too
"""

from __future__ import annotations

from collections import Counter
from enum import Enum
from typing import Annotated

import msgspec
from msgspec import Meta

from rankd.embeddings.table_spec import Count, TablePart, TableSpec
from rankd.errors import ConfigError, nearest
from rankd.plan.byte_sizes import show_bytes

Bytes = Annotated[int, Meta(ge=0)]


class Strategy(Enum):
    """How tables are placed; `strategies.py` says more of each."""

    SINGULAR = "singular"
    ONE_SHARD = "one-shard"
    CAPACITY_BALANCED = "capacity-balanced"
    LOAD_BALANCED = "load-balanced"
    NET_AWARE = "net-aware"


class MemoryLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes that tables may take in a shard and in a main process (None: as many as they need). Tables of up to
    `replicate_bytes` are replicated; `hot_row_bytes` is for the cache of hot rows in a main process."""

    shard_bytes: Bytes | None = None
    main_bytes: Bytes | None = None
    replicate_bytes: Bytes = 1024**2
    hot_row_bytes: Bytes = 0


class HotRows(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """So many of a table's hottest rows are cached by main processes."""

    table: str
    rows: Count


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one shard has: one part of a table at most."""

    parts: tuple[TablePart, ...]


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where every row of every table is: in one shard, or in every main process."""

    strategy: Strategy
    tables: tuple[TableSpec, ...]
    shards: tuple[Shard, ...]
    replicated: tuple[str, ...]
    hot_rows: tuple[HotRows, ...]
    limits: MemoryLimits

    @property
    def specs(self) -> dict[str, TableSpec]:
        """Tables by name."""
        return {table.name: table for table in self.tables}

    @property
    def main_bytes(self) -> int:
        """Of the tables and rows in a main process."""
        specs = self.specs
        return self.hot_row_bytes + sum(specs[name].size_bytes for name in self.replicated)

    @property
    def hot_row_bytes(self) -> int:
        """Of the rows that a main process caches."""
        specs = self.specs
        return sum(hot.rows * specs[hot.table].row_bytes for hot in self.hot_rows)

    @property
    def shard_bytes(self) -> tuple[int, ...]:
        """Of the tables in each shard."""
        specs = self.specs
        return tuple(sum(part_bytes(part, specs[part.table]) for part in shard.parts) for shard in self.shards)


def part_bytes(part: TablePart, spec: TableSpec) -> int:
    """Of the rows of a part."""
    return part.rows_of(spec) * spec.row_bytes


def show_shards(number: int) -> str:
    """ "1 shard", "2 shards"."""
    return f"{number} shard" if number == 1 else f"{number} shards"


def check_plan(plan: Plan, source: str) -> None:
    """Do nothing if the plan covers every row once and keeps its limits.

    Raises:
        ConfigError: an unknown table, rows that nobody or two have, or more bytes than allowed.
    """
    if twice := [name for name, count in Counter(table.name for table in plan.tables).items() if count > 1]:
        raise ConfigError(f"{source}: table '{twice[0]}' is declared twice")
    _check_names(plan, source)
    places: dict[str, list[tuple[int, TablePart]]] = {table.name: [] for table in plan.tables}
    for number, shard in enumerate(plan.shards):
        for part in shard.parts:
            places[part.table].append((number, part))
    for table in plan.tables:
        _check_cover(table, places[table.name], plan.replicated.count(table.name), source)
    _check_limits(plan, source)


def _check_names(plan: Plan, source: str) -> None:
    specs = plan.specs
    used = [(f"shard {number}", part.table) for number, shard in enumerate(plan.shards) for part in shard.parts]
    used += [("replicated", name) for name in plan.replicated] + [("hot_rows", hot.table) for hot in plan.hot_rows]
    for place, name in used:
        if name not in specs:
            raise ConfigError(f"{source}: {place}: there is no table '{name}'.{nearest(name, specs)}")
    cached = [hot.table for hot in plan.hot_rows]
    for hot in plan.hot_rows:
        if hot.table in plan.replicated or cached.count(hot.table) > 1:
            raise ConfigError(f"{source}: hot_rows: '{hot.table}' is there twice, or is replicated as a whole")
        if hot.rows > specs[hot.table].rows:
            raise ConfigError(
                f"{source}: hot_rows: {hot.rows:,} rows of '{hot.table}', which has {specs[hot.table].rows:,}"
            )


def _check_cover(table: TableSpec, places: list[tuple[int, TablePart]], copies: int, source: str) -> None:
    name = table.name
    if copies > 1 or (copies and places):
        shards = ", ".join(str(number) for number, _ in places)
        where = f"replicated and in shards {shards}" if places else f"replicated {copies} times"
        raise ConfigError(f"{source}: table '{name}' is {where}; it is either replicated or in shards, once")
    if copies:
        return
    if not places:
        raise ConfigError(f"{source}: nobody has table '{name}' ({table.rows:,} rows)")
    modulus = places[0][1].modulus
    owner: dict[int, int] = {}
    shards_of: set[int] = set()
    for number, part in places:
        if part.modulus != modulus:
            raise ConfigError(
                f"{source}: table '{name}' is split by {modulus} in shard {places[0][0]} and by {part.modulus} in "
                f"shard {number}; a table has one modulus"
            )
        if part.remainder >= min(modulus, table.rows):
            raise ConfigError(
                f"{source}: shard {number}: table '{name}' of {table.rows:,} rows has no rows with remainder "
                f"{part.remainder} by modulus {modulus}"
            )
        if part.remainder in owner or number in shards_of:
            raise ConfigError(
                f"{source}: shard {number}: remainder {part.remainder} of table '{name}' is in shard "
                f"{owner.get(part.remainder, number)} too, or the shard has another part; once each"
            )
        owner[part.remainder] = number
        shards_of.add(number)
    parts = min(modulus, table.rows)
    if len(owner) < parts:
        lost = next(remainder for remainder in range(parts) if remainder not in owner)
        raise ConfigError(
            f"{source}: nobody has the rows of table '{name}' with remainder {lost} by modulus {modulus} "
            f"({parts - len(owner)} of {parts} parts are missing)"
        )


def _check_limits(plan: Plan, source: str) -> None:
    limits = plan.limits
    places = [
        ("the cache of hot rows", plan.hot_row_bytes, limits.hot_row_bytes),
        ("the main process", plan.main_bytes, limits.main_bytes),
    ]
    places += [(f"shard {number}", size, limits.shard_bytes) for number, size in enumerate(plan.shard_bytes)]
    for place, size, limit in places:
        if limit is not None and size > limit:
            raise ConfigError(
                f"{source}: {place} needs {show_bytes(size)} ({size:,} bytes), and {show_bytes(limit)} ({limit:,}) "
                "are allowed"
            )
