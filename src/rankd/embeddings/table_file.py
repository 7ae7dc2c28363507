"""Tables on disk, mapped into memory: nothing is copied, and what is looked up is read when it is first needed.

In: a file that `table_writing.py` wrote. Out: `Table`, whose rows lie in the page cache of the operating system, shared
by all processes that open it. The file must not be changed or cut short while it is open; it is written once.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np

from rankd.embeddings.table_format import HEADER_BYTES, read_header
from rankd.embeddings.table_spec import TablePart, TableSpec
from rankd.errors import ArtifactError
from rankd.types import Array


class Pages(Enum):
    """How a table is read from disk.

    HUGE: 2 MiB at a time where Linux and the file system can (ext4 of 6.18 does; asking costs nothing elsewhere), for
    tables that stay in memory: random rows of 1 GB, once in memory, come 2.3 times as fast as from SMALL, as fast as
    from huge pages of the process's own. SMALL: the page of a row alone, for tables that do not fit.
    """

    HUGE = "huge"
    SMALL = "small"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of `spec` that are in `part`: records (n, row_bytes) uint8 (`row_storage.py`), rows of any stride.
    `content`: see `table_format.py`; empty where nobody knows it."""

    spec: TableSpec
    part: TablePart
    records: Array
    content: str = ""


def pages_for(size_bytes: int) -> Pages:
    """For tables of so many bytes in all: HUGE if they fit into half of the machine's memory."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Pages.HUGE if 2 * size_bytes <= memory_bytes else Pages.SMALL


def open_table(path: Path, part: TablePart | None = None, pages: Pages = Pages.HUGE) -> Table:
    """A table's file, all that is in it; or a part of it, as a view of every modulus-th row.

    Raises:
        ArtifactError: the file is missing, truncated, altered or foreign, or does not have that part.
    """
    spec, kept, content = read_header(path)
    part = part or kept
    if part.table != spec.name or not 0 <= part.remainder < part.modulus or (part != kept and kept.modulus != 1):
        raise ArtifactError(f"{path} has {_said(kept)} and was asked for {_said(part)}; give the file that has it")
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be mapped into memory: {error}") from None
    for advice in ("MADV_RANDOM", "MADV_HUGEPAGE") if pages is Pages.HUGE else ("MADV_RANDOM",):
        with contextlib.suppress(AttributeError, OSError):  # this system does not know it
            mapped.madvise(getattr(mmap, advice))
    try:
        rows = kept.rows_of(spec)
        records = np.frombuffer(mapped, np.uint8, rows * spec.row_bytes, HEADER_BYTES).reshape(rows, spec.row_bytes)
    except ValueError as error:  # the file became shorter since
        raise ArtifactError(f"{path}: {error}") from None
    return Table(spec, part, records if part == kept else records[part.remainder :: part.modulus], content)


def _said(part: TablePart) -> str:
    return f"the rows of '{part.table}' with remainder {part.remainder} of modulus {part.modulus}"
