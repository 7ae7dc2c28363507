"""A plan's file: JSON with its tables, so that whoever starts shards needs nothing else; it is checked when read."""

from __future__ import annotations

from pathlib import Path

import msgspec

from rankd.config import read_struct
from rankd.errors import ConfigError
from rankd.plan.declaration import Declaration, Net, check_declaration
from rankd.plan.prediction import Prediction
from rankd.plan.table_plan import Plan, check_plan

FORMAT = 1


class PlanFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file: the model's name, its nets (none: all tables form one), the plan, and its prediction."""

    format: int
    model: str
    nets: tuple[Net, ...]
    plan: Plan
    prediction: Prediction | None = None


def write_plan(path: Path, declaration: Declaration, plan: Plan, prediction: Prediction | None = None) -> None:
    """Write a plan of a declaration's tables.

    Raises:
        ConfigError: the file cannot be written.
    """
    document = PlanFile(FORMAT, declaration.name, declaration.nets, plan, prediction)
    write_json(path, document)


def write_json(path: Path, document: msgspec.Struct) -> None:
    """A Struct as indented JSON.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error


def read_plan(path: Path) -> PlanFile:
    """A plan that covers every row of every table once and keeps its memory limits.

    Raises:
        ConfigError: unreadable, another format, an unknown key or a bad value, rows that nobody or two have, or more
            bytes than the limits allow.
    """
    found = read_struct(PlanFile, path)
    check_plan_file(found, str(path))
    return found


def check_plan_file(found: PlanFile, source: str) -> None:
    """Do nothing if it is as `read_plan` wants it.

    Raises:
        ConfigError: another format, rows that nobody or two have, or more bytes than the limits allow.
    """
    if found.format != FORMAT:
        raise ConfigError(f"{source} has format {found.format}, and this rankd reads {FORMAT}; plan again")
    check_declaration(Declaration(found.model, found.plan.tables, found.nets), source)
    check_plan(found.plan, source)
    told = found.prediction
    if told is not None and len(told.shards) != len(found.plan.shards):
        raise ConfigError(
            f"{source}: {len(found.plan.shards)} shards, and a prediction of {len(told.shards)}; plan again"
        )
