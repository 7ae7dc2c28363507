"""Configuration: one reader for TOML and JSON files, environment variables and flags, the later over the earlier.

A folder declares its configuration as a frozen msgspec Struct; this file fills it. An unknown key or a bad value stops
the program with the path of the key and the nearest known one. In the environment a key `a.b` is RANKD_A__B, and a list
is separated by commas.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from rankd.errors import ConfigError, nearest

T = TypeVar("T", bound=msgspec.Struct)
PREFIX = "RANKD_"


def read_config(
    kind: type[T],
    path: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> T:
    """A configuration from its defaults, a TOML file, RANKD_* variables, and flags that are not None ("a.b": value).

    Raises:
        ConfigError: an unreadable file, an unknown key, or a value of the wrong type or range.
    """
    document = read_toml(path) if path is not None else {}
    for name, value in sorted((environment or {}).items()):
        if name.startswith(PREFIX):
            key = name.removeprefix(PREFIX).lower().replace("__", ".")
            _put(document, key, value.split(",") if _is_list(kind, key) else value)
    for key, value in (flags or {}).items():
        if value is not None:
            _put(document, key, value)
    return convert(document, kind, str(path) if path else "configuration", lax=True)


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML document.

    Raises:
        ConfigError: not there, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConfigError: not there, not JSON, or not an object.
    """
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} holds a {type(document).__name__}; it has to be one JSON object")
    return document


def read_struct(kind: type[T], path: Path) -> T:
    """A TOML file, or JSON if its name ends so, as a Struct, keys and types checked.

    Raises:
        ConfigError: unreadable, an unknown key, or a bad value.
    """
    return convert(read_json(path) if path.suffix == ".json" else read_toml(path), kind, str(path))


def convert(document: Mapping[str, Any], kind: type[T], source: str, lax: bool = False) -> T:
    """A document as a Struct; `lax` reads numbers and booleans from text too (the environment's values are text).

    Raises:
        ConfigError: an unknown key (with the nearest known one), or a bad value.
    """
    _check_keys(document, kind, source, "")
    try:
        return msgspec.convert(document, kind, strict=not lax)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {error}") from error


def _check_keys(document: Mapping[str, Any], kind: Any, source: str, path: str) -> None:
    """Unknown keys, found before conversion so that the message can suggest one."""
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in document.items():
        if key not in fields:
            known = ", ".join(fields)
            raise ConfigError(f"{source}: unknown key '{path}{key}'; known here are {known}.{nearest(key, fields)}")
        inner = msgspec.inspect.type_info(fields[key])
        if isinstance(inner, msgspec.inspect.UnionType):  # a part that may be left out
            structs = [one for one in inner.types if isinstance(one, msgspec.inspect.StructType)]
            inner = structs[0] if len(structs) == 1 else inner
        if isinstance(inner, msgspec.inspect.StructType) and isinstance(value, Mapping):
            _check_keys(value, inner.cls, source, f"{path}{key}.")
        elif isinstance(inner, msgspec.inspect.DictType) and isinstance(value, Mapping):
            for name, one in value.items():
                if isinstance(inner.value_type, msgspec.inspect.StructType) and isinstance(one, Mapping):
                    _check_keys(one, inner.value_type.cls, source, f"{path}{key}.{name}.")
        elif isinstance(inner, msgspec.inspect.VarTupleType) and isinstance(value, list):
            item = inner.item_type
            for number, one in enumerate(value):
                if isinstance(item, msgspec.inspect.StructType) and isinstance(one, Mapping):
                    _check_keys(one, item.cls, source, f"{path}{key}[{number}].")


def _is_list(kind: Any, dotted: str) -> bool:
    """Whether a key holds a list; an unknown key does not, and is refused later."""
    key, _, rest = dotted.partition(".")
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    if key not in fields:
        return False
    inner = msgspec.inspect.type_info(fields[key])
    if isinstance(inner, msgspec.inspect.DictType) and isinstance(inner.value_type, msgspec.inspect.StructType):
        inner, (_, _, rest) = inner.value_type, rest.partition(".")
    if isinstance(inner, msgspec.inspect.StructType) and rest:
        return _is_list(inner.cls, rest)
    return isinstance(inner, msgspec.inspect.VarTupleType)


def _put(document: dict[str, Any], dotted: str, value: Any) -> None:
    *folders, key = dotted.split(".")
    for folder in folders:
        document = document.setdefault(folder, {})
        if not isinstance(document, dict):
            raise ConfigError(f"'{dotted}' is given, and '{folder}' as a whole is {document!r}; give one of the two")
    document[key] = value
