"""The header of a table's file, `<name>.safetensors`: written, and read with distrust.

The file is a safetensors file of one tensor, `rows`: F32 or F16 (rows, D), or U8 (rows, row_bytes) for the integer
storages (`row_storage.py`). Its header is filled up with spaces to HEADER_BYTES, so that rows begin on a page. The
metadata says of which table they are, and which part of it; their checksum covers the metadata, not the rows: opening
takes the same time for every size. `content` is the fingerprint that all rows of the whole table had when they were
written: parts of a table have the same one, and tables of other rows another one. Older files have none.

    {"__metadata__":{"format":"rankd.table","version":"1","storage":"int8","rows":"7","dim":"64","modulus":"3",
    "remainder":"0","content":"...","crc32":"..."},"rows":{"dtype":"U8","shape":[3,72],"data_offsets":[0,216]}}
"""

from __future__ import annotations

import zlib
from pathlib import Path

import msgspec

from rankd.embeddings.table_spec import TablePart, TableSpec, TableStorage
from rankd.errors import ArtifactError

FOLDER, SUFFIX = "embeddings", ".safetensors"
"""Of a model version, and of a table's file."""
HEADER_BYTES = 4096
"""Before the rows: 8 of length, JSON, spaces."""
_LENGTH_BYTES = 8
_FORMAT, _VERSION = "rankd.table", "1"
_DTYPES = {TableStorage.FP32: "F32", TableStorage.FP16: "F16", TableStorage.INT8: "U8", TableStorage.INT4: "U8"}
_MOST_DIGITS = 18
_CONTENT_DIGITS = 32
_MOST_BYTES = 2**62


class _Metadata(msgspec.Struct, forbid_unknown_fields=True):
    """Strings, as safetensors has it."""

    format: str
    version: str
    storage: str
    rows: str
    dim: str
    modulus: str
    remainder: str
    content: str | msgspec.UnsetType = msgspec.UNSET
    crc32: str = ""


class _Tensor(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, int]
    data_offsets: tuple[int, int]


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    metadata: _Metadata = msgspec.field(name="__metadata__")
    rows: _Tensor


def file_bytes(spec: TableSpec, part: TablePart) -> int:
    """Of a part's file."""
    return HEADER_BYTES + part.rows_of(spec) * spec.row_bytes


def header(spec: TableSpec, part: TablePart, content: str = "") -> bytes:
    """The first HEADER_BYTES of a part's file; `content` is empty where nobody knows it."""
    rows = part.rows_of(spec)
    scaled = _DTYPES[spec.storage] == "U8"
    metadata = _Metadata(
        _FORMAT,
        _VERSION,
        spec.storage.value,
        *(str(number) for number in (spec.rows, spec.dim, part.modulus, part.remainder)),
    )
    metadata.content = content or msgspec.UNSET
    metadata.crc32 = f"{zlib.crc32(msgspec.json.encode(metadata)):08x}"
    shape = (rows, spec.row_bytes if scaled else spec.dim)
    tensor = _Tensor(_DTYPES[spec.storage], shape, (0, rows * spec.row_bytes))
    text = msgspec.json.encode(_Header(metadata, tensor)).ljust(HEADER_BYTES - _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def read_header(path: Path) -> tuple[TableSpec, TablePart, str]:
    """Which table a file is of, by its name and header, which part of it, and the table's `content`.

    Raises:
        ArtifactError: it is not there, not a table's, or altered; or it has not the length that it says.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(HEADER_BYTES)
            size_bytes = file.seek(0, 2)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read as a table: {error.strerror}") from None
    try:
        metadata = msgspec.json.decode(begin[_LENGTH_BYTES:], type=_Header).metadata
        spec, part, content = _parsed(metadata, path.name.removesuffix(SUFFIX))
    except (msgspec.DecodeError, ValueError) as error:
        raise ArtifactError(f"{path}: not a table, or its header was altered ({error}); write it anew") from None
    if header(spec, part, content) != begin:
        raise ArtifactError(f"{path}: the header of the table was altered; write it anew")
    if size_bytes != file_bytes(spec, part):
        wanted = file_bytes(spec, part)
        raise ArtifactError(f"{path}: {size_bytes} bytes, and by its header it has {wanted}; write it anew")
    return spec, part, content


def _parsed(metadata: _Metadata, name: str) -> tuple[TableSpec, TablePart, str]:
    """Raises ValueError for what no table has."""
    if (metadata.format, metadata.version) != (_FORMAT, _VERSION):
        raise ValueError(f"format {metadata.format} {metadata.version}, not {_FORMAT} {_VERSION}")
    texts = (metadata.rows, metadata.dim, metadata.modulus, metadata.remainder)
    if any(len(text) > _MOST_DIGITS for text in texts):
        raise ValueError("a number is too large")
    rows, dim, modulus, remainder = (int(text) for text in texts)
    if min(rows, dim, modulus) < 1 or not 0 <= remainder < modulus:
        raise ValueError(f"{rows} rows of {dim}, remainder {remainder} of modulus {modulus}")
    spec = TableSpec(name, rows, dim, TableStorage(metadata.storage))
    if spec.size_bytes > _MOST_BYTES:
        raise ValueError(f"{spec.size_bytes} bytes")
    content = metadata.content or ""
    if len(content) not in (0, _CONTENT_DIGITS):
        raise ValueError(f"a fingerprint of {len(content)} digits")
    return spec, TablePart(name, modulus, remainder), content
