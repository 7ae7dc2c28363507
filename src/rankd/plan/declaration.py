"""The tables of a model and the nets that use them, declared in a TOML or JSON file. `table_statistics.py` says how
they are asked.

    name = "shop"

    [[tables]]
    name = "user"
    rows = 1000000
    dim = 64
    storage = "int8"            # fp32 if left out

    [[nets]]                    # all tables form one net if there are none
    name = "user"
    tables = ["user"]

    [[statistics]]              # may be left out, or be in a file of its own
    table = "user"
    lookups = 1

A folder of a model version declares the tables that are beside its graph. "dlrm-v2" is
packaged; "dlrm-v2/20" has a twentieth of its rows, "dlrm-v2x10" ten times as many.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import msgspec

from rankd.config import read_struct
from rankd.embeddings.table_format import FOLDER, SUFFIX, read_header
from rankd.embeddings.table_spec import TableSpec
from rankd.errors import ConfigError, nearest
from rankd.plan.table_statistics import TableLoad, TableStatistics

PACKAGED = Path(__file__).parent / "models"
WHOLE = "all"
"""The net of all tables, where a declaration has none."""


class Net(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tables that are asked together, in one call a shard."""

    name: str
    tables: tuple[str, ...]


class Declaration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file. Every table is in one net, or there are no nets."""

    name: str
    tables: tuple[TableSpec, ...]
    nets: tuple[Net, ...] = ()
    statistics: tuple[TableStatistics, ...] = ()


class StatisticsFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `rankd plan stats` writes: `samples` is how many were counted."""

    samples: int
    tables: tuple[TableStatistics, ...]


def read_declaration(name: str) -> Declaration:
    """A packaged model by its name, maybe with a factor for its rows, or a file.

    Raises:
        ConfigError: no such model or file, an unknown key, a bad value, or tables, nets and statistics that do not fit.
    """
    packaged = sorted(path.stem for path in PACKAGED.glob("*.toml"))
    scaled = re.fullmatch(rf"({'|'.join(map(re.escape, packaged))})(?:([/x])([1-9]\d*))?", name)
    if scaled is None:
        path = Path(name)
        if (path / FOLDER).is_dir():
            return tables_of(path)
        if not path.is_file():
            raise ConfigError(
                f"there is no file or model version '{name}', and packaged models are {', '.join(packaged)} "
                f"(rows by a factor: {packaged[0]}/20, {packaged[0]}x10).{nearest(name, packaged)}"
            )
        declaration = read_struct(Declaration, path)
    else:
        model, sign, number = scaled.groups()
        declaration = read_struct(Declaration, PACKAGED / f"{model}.toml")
        if sign is not None:
            times, over = (1, int(number)) if sign == "/" else (int(number), 1)
            tables = tuple(msgspec.structs.replace(t, rows=-(-t.rows * times // over)) for t in declaration.tables)
            declaration = msgspec.structs.replace(declaration, name=name, tables=tables)
    check_declaration(declaration, name)
    return declaration


def tables_of(version: Path) -> Declaration:
    """The tables that a model version has beside its graph.

    Raises:
        ArtifactError: one of them is damaged. ConfigError: there are none.
    """
    files = sorted((version / FOLDER).glob(f"*{SUFFIX}"))
    declaration = Declaration(version.resolve().parent.name, tuple(read_header(file)[0] for file in files))
    check_declaration(declaration, str(version))
    return declaration


def check_declaration(declaration: Declaration, source: str) -> None:
    """Do nothing if tables, nets and statistics fit each other.

    Raises:
        ConfigError: no tables, a name twice, an unknown table, or a table without a net.
    """
    tables = [table.name for table in declaration.tables]
    if not tables:
        raise ConfigError(f"{source}: there are no tables; declare one at least")
    _check_once(tables, f"{source}: table")
    _check_once([net.name for net in declaration.nets], f"{source}: net")
    members = [table for net in declaration.nets for table in net.tables]
    _check_known(members, tables, f"{source}: nets")
    _check_once(members, f"{source}: nets: table")
    if declaration.nets and len(members) < len(tables):
        lost = ", ".join(sorted(set(tables) - set(members)))
        raise ConfigError(f"{source}: {lost} are in no net; put every table into one, or declare no nets")
    check_statistics(declaration.statistics, tables, source)


def check_statistics(statistics: Iterable[TableStatistics], tables: list[str], source: str) -> None:
    """Do nothing if each is of another table, and the tables are known.

    Raises:
        ConfigError: a table twice, or an unknown one.
    """
    names = [one.table for one in statistics]
    _check_known(names, tables, f"{source}: statistics")
    _check_once(names, f"{source}: statistics: table")


def loads_of(declaration: Declaration, statistics: Iterable[TableStatistics] = ()) -> tuple[TableLoad, ...]:
    """Tables in the order declared, each with its net and statistics: those given, else the declaration's own, else
    one look-up a sample."""
    net_of = {table: net.name for net in declaration.nets for table in net.tables}
    known = {one.table: one for one in (*declaration.statistics, *statistics)}
    return tuple(
        TableLoad(spec, net_of.get(spec.name, WHOLE), known.get(spec.name, TableStatistics(spec.name)))
        for spec in declaration.tables
    )


def read_loads(version: Path, statistics: Path | None = None) -> tuple[TableLoad, ...]:
    """The tables that a model version has beside its graph, asked as a file of statistics says; () if it has none.

    Raises:
        ArtifactError: a table is damaged. ConfigError: statistics that cannot be read or are of other tables.
    """
    if not (version / FOLDER).is_dir():
        return ()
    declaration = tables_of(version)
    counted = () if statistics is None else read_struct(StatisticsFile, statistics).tables
    check_statistics(counted, [table.name for table in declaration.tables], str(statistics))
    return loads_of(declaration, counted)


def _check_once(names: Iterable[str], what: str) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"{what} '{twice[0]}' is there twice; each may be once")


def _check_known(names: Iterable[str], known: list[str], what: str) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"{what}: there is no table '{name}'.{nearest(name, known)}")
