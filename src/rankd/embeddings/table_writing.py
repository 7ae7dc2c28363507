"""Tables written to disk, block by block, so that they may be larger than memory. Next: `table_file.py` opens them.

A file is written beside its place, synced and renamed: it is there whole or not at all.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import xxhash

from rankd.embeddings.row_storage import pack_rows
from rankd.embeddings.table_file import Table
from rankd.embeddings.table_format import HEADER_BYTES, SUFFIX, header
from rankd.embeddings.table_spec import TablePart, TableSpec
from rankd.errors import BuildError
from rankd.types import Array, Float32Array

_COPIED_BYTES = 1 << 24


def write_table(folder: Path, spec: TableSpec, blocks: Iterable[Float32Array]) -> Path:
    """`<folder>/<name>.safetensors` of blocks (n, dim) float32, spec.rows rows in all.

    Raises:
        BuildError: a name that is none for a file, another number of rows or columns, or numbers that the storage does
            not hold. Nothing is left behind.
    """
    return _written(folder, spec, TablePart(spec.name), _packed(spec, blocks))


def write_part(folder: Path, table: Table, part: TablePart) -> Path:
    """`<folder>/<name>.safetensors` of a part alone, as a shard keeps it.

    Raises:
        BuildError: the table is a part itself, another table, or has no such part.
    """
    if part.table != table.spec.name or table.part.modulus != 1 or not 0 <= part.remainder < part.modulus:
        raise BuildError(f"{part} was asked for; parts are cut from a whole table of that name, remainder < modulus")
    records = table.records[part.remainder :: part.modulus]
    step = max(_COPIED_BYTES // table.spec.row_bytes, 1)
    blocks = (records[first : first + step] for first in range(0, len(records), step))
    return _written(folder, table.spec, part, blocks, table)


def _packed(spec: TableSpec, blocks: Iterable[Float32Array]) -> Iterator[Array]:
    rows = 0
    for block in blocks:
        if block.ndim != 2 or block.shape[1] != spec.dim or block.dtype != np.float32:
            raise BuildError(
                f"table '{spec.name}': a block is (n, {spec.dim}) float32, not {block.shape} {block.dtype}"
            )
        try:
            yield pack_rows(block, spec.storage)
        except BuildError as error:
            raise BuildError(f"table '{spec.name}', block that begins at row {rows}: {error}") from None
        rows += len(block)
    if rows != spec.rows:
        raise BuildError(f"table '{spec.name}' has {spec.rows} rows, and the blocks {rows}")


def _written(
    folder: Path, spec: TableSpec, part: TablePart, blocks: Iterable[Array], whole: Table | None = None
) -> Path:
    """`whole` is the table that a part is cut from; its rows' fingerprint is not that of the blocks."""
    path = folder / (spec.name + SUFFIX)
    if not spec.name or path.parent != folder or "\0" in spec.name:
        raise BuildError(f"a table is named as its file is, without / and not empty; '{spec.name}' is not possible")
    beside, content = folder / f".{spec.name}.{secrets.token_hex(8)}", xxhash.xxh3_128(spec.storage.value.encode())
    try:
        with beside.open("xb") as file:
            file.seek(HEADER_BYTES)
            for block in blocks:
                rows = np.ascontiguousarray(block).data
                content.update(rows)
                file.write(rows)
            file.seek(0)
            file.write(header(spec, part, content.hexdigest() if whole is None else whole.content))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return path
