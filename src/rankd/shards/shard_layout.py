"""Which shard has which parts of which tables, and in which net a table is asked for.

Worked example, tables "item" (7 rows, split by modulus 2), "user" and "city" (whole), two shards:

    nets      user: user, city     item: item
    shards    a at two addresses: item 0 of 2, user     b: item 1 of 2, city
    a serves  net user: [user]     net item: [item 0 of 2, 4 rows]
    b serves  net user: [city]     net item: [item 1 of 2, 3 rows]

On the wire a net is its place in that list, and a part its place in its net: both sides list them in the same order,
and compare the lists when they connect.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import msgspec

from rankd.embeddings.table_spec import Count, TablePart, TableSpec
from rankd.errors import ConfigError, nearest


class Net(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tables that are asked for together: one call for each shard that has parts of them."""

    name: str
    tables: tuple[TableSpec, ...]


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A process, or several equal ones (`addresses`, "host:port"), and its parts, at most one of a table."""

    name: str
    addresses: tuple[str, ...]
    parts: tuple[TablePart, ...]


class ServedPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part as a shard serves it: `rows` of its own, each `dim` wide."""

    part: TablePart
    rows: int
    dim: Count


class ServedNet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A net as a shard serves it: those of its tables that it has a part of."""

    name: str
    parts: tuple[ServedPart, ...]


class ShardLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All nets and all shards. `plan` names the layout; a shard of another plan is not asked."""

    plan: str
    nets: tuple[Net, ...]
    shards: tuple[Shard, ...]

    def check(self) -> None:
        """Do nothing if each table is in one net and its parts are there once each.

        Raises:
            ConfigError: they are not, or a name stands for two things.
        """
        tables = [spec.name for net in self.nets for spec in net.tables]
        for what, names in (
            ("table", tables),
            ("net", [net.name for net in self.nets]),
            ("shard", [shard.name for shard in self.shards]),
        ):
            twice = sorted(name for name, count in Counter(names).items() if count > 1)
            if twice:
                raise ConfigError(f"layout '{self.plan}' has {what} '{twice[0]}' twice; each stands in it once")
        parts: defaultdict[str, list[TablePart]] = defaultdict(list)
        for shard in self.shards:
            _check_shard(shard, tables)
            for part in shard.parts:
                parts[part.table].append(part)
        for table in tables:
            _check_parts(table, parts[table])

    def served_by(self, shard: Shard) -> tuple[ServedNet, ...]:
        """What a shard serves: nets in their order, without those that it has nothing of."""
        parts = {part.table: part for part in shard.parts}
        nets = []
        for net in self.nets:
            served = tuple(
                ServedPart(parts[spec.name], parts[spec.name].rows_of(spec), spec.dim)
                for spec in net.tables
                if spec.name in parts
            )
            if served:
                nets.append(ServedNet(net.name, served))
        return tuple(nets)


def _check_shard(shard: Shard, tables: list[str]) -> None:
    if not shard.addresses:
        raise ConfigError(f"shard '{shard.name}' has no address; give at least one host:port")
    names = [part.table for part in shard.parts]
    for name in names:
        if name not in tables:
            raise ConfigError(f"shard '{shard.name}' has a part of '{name}', which no net has.{nearest(name, tables)}")
        if names.count(name) > 1:
            raise ConfigError(f"shard '{shard.name}' has two parts of '{name}'; split it by a smaller modulus")


def _check_parts(table: str, parts: list[TablePart]) -> None:
    moduli = {part.modulus for part in parts}
    if len(moduli) != 1:
        words = " and by ".join(map(str, sorted(moduli))) or "nothing"
        raise ConfigError(f"table '{table}' is split by {words}; all of its rows are in parts of one modulus")
    (modulus,) = moduli
    remainders = sorted(part.remainder for part in parts)
    if remainders != list(range(modulus)):
        raise ConfigError(
            f"of table '{table}', split by {modulus}, the parts {remainders} are on shards; each of 0 to {modulus - 1} "
            "has to be there once (replicas are addresses of one shard)"
        )
