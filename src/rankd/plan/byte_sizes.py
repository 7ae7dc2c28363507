"""Sizes in bytes as people write them: 1.5 GiB."""

from __future__ import annotations

import re

from rankd.errors import ConfigError

UNITS = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}


def show_bytes(size: float) -> str:
    """1536 -> "1.5 KiB"."""
    unit = max((unit for unit, of in UNITS.items() if of <= size), key=UNITS.__getitem__, default="B")
    return f"{size:,.0f} B" if unit == "B" else f"{size / UNITS[unit]:,.1f} {unit}"


def read_bytes(text: str) -> int:
    """ "1.5 KiB" -> 1536; a number alone is bytes.

    Raises:
        ConfigError: not a number with one of the units.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): of for unit, of in UNITS.items()} | {"": 1}
    if found is None or found[2].lower() not in units:
        raise ConfigError(f"'{text}' is no size; give a number and one of {', '.join(UNITS)}, for example 32GiB")
    return int(float(found[1]) * units[found[2].lower()])
