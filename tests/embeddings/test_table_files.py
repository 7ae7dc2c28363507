"""Tables on disk: what is written is opened, whole or in parts; what was damaged is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.local_tables import LocalTables
from rankd.embeddings.row_storage import pack_rows
from rankd.embeddings.table_file import Pages, open_table, pages_for
from rankd.embeddings.table_format import HEADER_BYTES, file_bytes, header
from rankd.embeddings.table_spec import TablePart, TableSpec, TableStorage
from rankd.embeddings.table_writing import write_part, write_table
from rankd.errors import ArtifactError, BuildError
from rankd.types import Float32Array

from .made_tables import numbers_of


def numbers(rows: int, dim: int) -> Float32Array:
    return np.random.default_rng(0).normal(size=(rows, dim)).astype(np.float32)


def written(folder: Path, storage: TableStorage = TableStorage.INT8, rows: int = 7, dim: int = 5) -> Path:
    return write_table(folder, TableSpec("shop", rows, dim, storage), [numbers(rows, dim)])


@pytest.mark.parametrize("storage", TableStorage)
@pytest.mark.parametrize("pages", Pages)
def test_written_in_blocks_and_opened(tmp_path: Path, storage: TableStorage, pages: Pages) -> None:
    spec, rows = TableSpec("shop", 7, 5, storage), numbers(7, 5)
    path = write_table(tmp_path, spec, iter([rows[:3], rows[3:3], rows[3:]]))
    table = open_table(path, pages=pages)
    assert (path.name, table.spec, table.part) == ("shop.safetensors", spec, TablePart("shop"))
    assert np.array_equal(table.records, pack_rows(rows, storage))
    assert not table.records.flags.writeable
    assert path.stat().st_size == file_bytes(spec, TablePart("shop")) == HEADER_BYTES + spec.size_bytes
    assert [one.name for one in tmp_path.iterdir()] == ["shop.safetensors"]


@pytest.mark.parametrize("storage", TableStorage)
def test_others_read_it_as_safetensors(tmp_path: Path, storage: TableStorage) -> None:
    ((name, found),) = safetensors.numpy.load_file(written(tmp_path, storage)).items()
    expected = pack_rows(numbers(7, 5), storage)
    assert (name, len(found)) == ("rows", 7)
    assert np.array_equal(found.view(np.uint8), expected)
    assert found.dtype == {"fp32": np.float32, "fp16": np.float16}.get(storage.value, np.uint8)


@pytest.mark.parametrize("storage", TableStorage)
@pytest.mark.parametrize("modulus", [1, 2, 3, 9])
def test_a_part_is_every_modulus_th_row(tmp_path: Path, storage: TableStorage, modulus: int) -> None:
    path = written(tmp_path, storage)
    whole = numbers_of(open_table(path))
    for remainder in range(modulus):
        part = TablePart("shop", modulus, remainder)
        seen = open_table(path, part)
        assert np.array_equal(numbers_of(seen), whole[remainder::modulus])
        assert len(seen.records) == part.rows_of(seen.spec)
        assert modulus == 1 or not len(seen.records) or not seen.records.flags.owndata
        own = tmp_path / str(remainder)
        own.mkdir()
        kept = open_table(write_part(own, open_table(path), part))
        assert (kept.spec, kept.part) == (seen.spec, part)
        assert np.array_equal(kept.records, seen.records)
        assert np.array_equal(open_table(own / "shop.safetensors", part).records, seen.records)


def test_rows_have_a_fingerprint_that_parts_of_their_table_share(tmp_path: Path) -> None:
    path, again, other, own = written(tmp_path), tmp_path / "again", tmp_path / "other", tmp_path / "own"
    for folder in (again, other, own):
        folder.mkdir()
    spec, rows = TableSpec("shop", 7, 5, TableStorage.INT8), numbers(7, 5)
    whole = open_table(path)
    assert open_table(write_table(again, spec, iter([rows[:3], rows[3:]]))).content == whole.content
    rows[6, 4] += 1.0
    assert open_table(write_table(other, spec, [rows])).content not in ("", whole.content)
    part = TablePart("shop", 2, 1)
    for kept in (open_table(path, part), open_table(write_part(own, whole, part))):
        assert kept.content == whole.content


def test_a_file_of_an_older_rankd_has_no_fingerprint(tmp_path: Path) -> None:
    path = written(tmp_path)
    spec, part = TableSpec("shop", 7, 5, TableStorage.INT8), TablePart("shop")
    path.write_bytes(header(spec, part) + path.read_bytes()[HEADER_BYTES:])
    table = open_table(path)
    assert (table.spec, table.content) == (spec, "")
    with LocalTables([table]) as tables:
        assert tables.contents() == {"shop": ""}
    path.write_bytes(header(spec, part, "0123") + path.read_bytes()[HEADER_BYTES:])
    with pytest.raises(ArtifactError, match="a fingerprint of 4 digits"):
        open_table(path)


def test_a_part_that_a_file_does_not_have(tmp_path: Path) -> None:
    path = written(tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    half = write_part(own, open_table(path), TablePart("shop", 2, 1))
    asked = [(half, TablePart("shop")), (half, TablePart("shop", 2, 0)), (path, TablePart("genre"))]
    for where, part in [*asked, (path, TablePart("shop", 2, 2))]:
        with pytest.raises(ArtifactError, match="was asked for"):
            open_table(where, part)
    for table, part in (
        (open_table(half), TablePart("shop", 2, 1)),
        (open_table(path), TablePart("genre", 2, 1)),
        (open_table(path), TablePart("shop", 2, 2)),
    ):
        with pytest.raises(BuildError, match="whole table"):
            write_part(tmp_path, table, part)


def broken(rows: Float32Array) -> Iterator[Float32Array]:
    yield rows
    raise OSError("the source is gone")


def test_a_table_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    spec, rows = TableSpec("shop", 7, 5), numbers(7, 5)
    rows[6, 0] = np.nan
    with pytest.raises(OSError, match="gone"):
        write_table(tmp_path, spec, broken(numbers(7, 5)))
    with pytest.raises(BuildError, match="'shop', block that begins at row 3: row 3 of the block is not finite"):
        write_table(tmp_path, spec, [rows[:3], rows[3:]])
    for wrong in (numbers(8, 5), numbers(6, 5)):
        with pytest.raises(BuildError, match=r"7 rows, and the blocks [68]"):
            write_table(tmp_path, spec, [wrong])
    for wrong in (numbers(7, 4), numbers(7, 5).astype(np.float64), numbers(7, 5)[0]):  # type: ignore[assignment]
        with pytest.raises(BuildError, match=r"\(n, 5\) float32"):
            write_table(tmp_path, spec, [wrong])
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["shop.safetensors"]


@pytest.mark.parametrize("name", ["", "a/b", "../up", "\0"])
def test_a_name_that_is_none_for_a_file(tmp_path: Path, name: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    with pytest.raises(BuildError, match="named as its file"):
        write_table(inner, TableSpec(name, 1, 1), [numbers(1, 1)])
    assert list(tmp_path.rglob("*")) == [inner]


def test_cut_short_anywhere_or_longer(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    for length in [*range(0, HEADER_BYTES, 61), *range(HEADER_BYTES - 2, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match=r"shop\.safetensors"):
            open_table(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ArtifactError, match=r"bytes, and by its header"):
        open_table(path)


@pytest.mark.parametrize("storage", [TableStorage.FP32, TableStorage.INT4])
def test_every_byte_of_the_header_counts(tmp_path: Path, storage: TableStorage) -> None:
    path = written(tmp_path, storage)
    whole = path.read_bytes()
    masks = np.random.default_rng(1).integers(1, 256, HEADER_BYTES)
    for place in [*range(400), *range(400, HEADER_BYTES, 37)]:
        changed = bytearray(whole)
        changed[place] ^= int(masks[place])
        path.write_bytes(changed)
        with pytest.raises(ArtifactError, match=r"shop\.safetensors"):
            open_table(path)


def test_a_digit_changed_everywhere_alike_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path, TableStorage.INT4, dim=5)
    path.write_bytes(path.read_bytes().replace(b'"dim":"5"', b'"dim":"6"'))  # as many bytes a row
    with pytest.raises(ArtifactError, match="altered"):
        open_table(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "shop.safetensors"
    with pytest.raises(ArtifactError, match="No such file"):
        open_table(path)
    with pytest.raises(ArtifactError, match="directory"):
        open_table(tmp_path)
    safetensors.numpy.save_file({"rows": numbers(2000, 5)}, path)
    with pytest.raises(ArtifactError, match="not a table"):
        open_table(path)
    own = header(TableSpec("shop", 1, 1), TablePart("shop"))
    for old, new in (
        (b'"version":"1"', b'"version":"2"'),
        (b'"rows":"1"', b'"rows":"' + b"9" * 30 + b'"'),
        (b'"rows":"1","dim":"1"', b'"rows":"' + b"9" * 18 + b'","dim":"' + b"9" * 18 + b'"'),
    ):
        path.write_bytes(own.replace(old, new).ljust(HEADER_BYTES + 4))
        with pytest.raises(ArtifactError, match=r"rankd.table 2|too large|9 bytes|9[0-9]+ bytes"):
            open_table(path)


@pytest.mark.parametrize("pages", Pages)
def test_a_table_larger_than_memory(tmp_path: Path, pages: Pages) -> None:
    """50 GB, of which the file system keeps what was written."""
    spec = TableSpec("large", 100_000_000, 125)
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.write(header(spec, TablePart("large")))
        file.truncate(file_bytes(spec, TablePart("large")))
        file.seek(-spec.row_bytes, 2)
        file.write(numbers(1, 125).tobytes())
    table = open_table(tmp_path / "large.safetensors", pages=pages)
    ids = np.asarray([spec.rows - 1, 0, 51_234_567, spec.rows - 1])
    sums = LocalTables([table]).pool(JaggedIds(("large",), np.asarray([0, 4]), ids))
    assert np.array_equal(sums, 2 * numbers(1, 125))


def test_pages_by_size() -> None:
    assert (pages_for(1 << 20), pages_for(1 << 60)) == (Pages.HUGE, Pages.SMALL)
