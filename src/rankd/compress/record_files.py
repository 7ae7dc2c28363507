"""Records of a compression on disk: JSON files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import msgspec

from rankd.errors import ConfigError

S = TypeVar("S", bound=msgspec.Struct)


def write_record(path: Path, value: msgspec.Struct) -> None:
    """Replace a JSON file as a whole."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(value)))
    os.replace(part, path)


def read_record(path: Path, kind: type[S]) -> S:
    """What `write_record` wrote. Raises: ConfigError, it is not there or damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; remove {path.parent} and compress again") from error
