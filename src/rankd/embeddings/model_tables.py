"""The tables of a model version in this process: all files of its folder `embeddings/`, mapped.

In: that folder, and the widths that the model expects. Out: `LocalTables`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rankd.embeddings.local_tables import LocalTables
from rankd.embeddings.table_file import open_table, pages_for
from rankd.embeddings.table_format import FOLDER, SUFFIX
from rankd.errors import ArtifactError


def open_model_tables(version: Path, widths: Mapping[str, int], threads: int = 1) -> LocalTables:
    """The tables that `widths` names, of so many numbers a row.

    Raises:
        ArtifactError: a table is missing or damaged, a part of one, or of another width.
    """
    files = {name: version / FOLDER / f"{name}{SUFFIX}" for name in widths}
    pages = pages_for(sum(file.stat().st_size for file in files.values() if file.is_file()))
    tables = [open_table(file, pages=pages) for file in files.values()]
    for table in tables:
        spec = table.spec
        if table.part.modulus != 1 or spec.dim != widths[spec.name]:
            raise ArtifactError(
                f"{files[spec.name]} has rows of {spec.dim} numbers, modulus {table.part.modulus}; the model reads "
                f"whole tables, '{spec.name}' with {widths[spec.name]} numbers a row: build the version again"
            )
    return LocalTables(tables, threads)
