"""A file of costs: what `--costs` reads, what `rankd plan costs` writes. TOML with notes for people, or JSON."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from rankd.config import read_struct
from rankd.errors import ConfigError
from rankd.plan.cost_model import CostModel
from rankd.plan.plan_file import write_json

LOOKUPS = "lookups"


def read_costs(path: Path) -> CostModel:
    """A file of costs; what it leaves out has its default.

    Raises:
        ConfigError: unreadable, an unknown key, or a bad value.
    """
    return read_struct(CostModel, path)


def write_costs(path: Path, costs: CostModel, notes: Iterable[str] = ()) -> None:
    """Write all costs; a TOML file begins with the notes, a line each.

    Raises:
        ConfigError: the name ends in neither .toml nor .json, or the file cannot be written.
    """
    check_costs_path(path)
    if path.suffix == ".json":
        write_json(path, costs)
        return
    try:
        path.write_text(_toml(costs, notes))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error


def check_costs_path(path: Path) -> None:
    """Refuse, before anything is measured, what cannot be written after it.

    Raises:
        ConfigError: the name ends in neither .toml nor .json, or its folder is not there.
    """
    if path.suffix not in (".toml", ".json") or not path.parent.is_dir():
        raise ConfigError(f"{path}: give a file that ends in .toml or .json in a folder that is there")


def _toml(costs: CostModel, notes: Iterable[str]) -> str:
    document = msgspec.to_builtins(costs)
    lookups: dict[str, dict[str, float]] = document.pop(LOOKUPS)
    lines = [f"# {note}" for note in notes]
    lines += [
        f"{name} = {msgspec.json.encode(value).decode()}" for name, value in document.items() if value is not None
    ]
    for storage, cost in lookups.items():
        lines += ["", f"[{LOOKUPS}.{storage}]"]
        lines += [f"{name} = {msgspec.json.encode(value).decode()}" for name, value in cost.items()]
    return "\n".join(lines) + "\n"
