"""The artifact: a folder `<name>/<version>/` in which building and serving meet.

    model.toml            what it is: schema, inputs, state, engines, parity, metrics, and every file's checksum
    model.toml.sha256     the checksum of model.toml itself (readable by `sha256sum -c`)
    weights.safetensors   the reference weights
    tables/               items, users, histories, vocabularies (`features.catalogue` reads and writes them)
    engines/<target>/     compiled or exported graphs

A version is immutable and appears whole or not at all: it is written beside its place, checked in, and renamed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from rankd.embeddings.table_format import FOLDER
from rankd.errors import ArtifactError
from rankd.features.schema import FeatureSchema, TensorSpec
from rankd.gate_record import Compression

FORMAT = 2
MANIFEST = "model.toml"
MANIFEST_SUM = "model.toml.sha256"
WORK_PREFIX = ".building-"
UNREAD = f"{FOLDER}/"
"""Tables may be larger than memory: at a load their sizes are compared, and their headers when they are opened."""


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the artifact: its SHA-256 and its size."""

    sha256: str
    size_bytes: int


class EngineRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A compiled target. `parity` is max |logit - reference logit| for each precision, measured when it was built."""

    precision: str
    parity: dict[str, float]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """model.toml. `split` says whether the user's state is computed apart from the candidates (encode and score),
    `extends` whether new events can be appended to a state, `compression` how a compressed model was made and passed.
    `run_sha256` is the checksum of the trained weights of the run that it was built from, by which the gate records of
    what was compressed from that run name it; "" if it was built from no run.
    """

    format: int
    name: str
    version: str
    created: str
    model: str
    split: bool
    schema: FeatureSchema
    history_inputs: tuple[TensorSpec, ...]
    candidate_inputs: tuple[TensorSpec, ...]
    state: tuple[TensorSpec, ...]
    extends: bool
    engines: dict[str, EngineRecord]
    options: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    run_sha256: str = ""
    compression: Compression | msgspec.UnsetType = msgspec.UNSET
    files: dict[str, FileRecord] = {}


class Artifact:
    """An opened and verified version. `path` is its folder, `manifest` its model.toml."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: Path) -> Artifact:
        """Open a version folder, or a model folder (its latest version), and verify every file.

        Raises:
            ArtifactError: not there, of another format, truncated, altered, or with files it does not list.
        """
        folder = path if (path / MANIFEST).exists() else latest_version(path)
        manifest = read_manifest(folder)
        for name, record in manifest.files.items():
            _verify(folder / name, name, record)
        return cls(folder, manifest)

    @property
    def schema(self) -> FeatureSchema:
        """The schema of features."""
        return self.manifest.schema


def latest_version(model_folder: Path) -> Path:
    """The highest version in a model folder: numbers by value, after them names by the alphabet.

    Raises:
        ArtifactError: no version there.
    """
    versions = list_versions(model_folder)
    if not versions:
        raise ArtifactError(
            f"{model_folder}: no model version here (a folder with a {MANIFEST}); make one with `rankd build`"
        )
    return model_folder / versions[-1]


def list_versions(model_folder: Path) -> list[str]:
    """Names of the versions in a model folder, oldest first."""
    found = [p.parent.name for p in model_folder.glob(f"*/{MANIFEST}") if not p.parent.name.startswith(".")]
    return sorted(found, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))


def write_artifact(root: Path, name: str, version: str, fill: Callable[[Path], Manifest]) -> Path:
    """Write `<root>/<name>/<version>`: `fill` puts the files into a folder and says what they are; checksums follow.

    Nothing that loads is left behind if `fill` or this process fails on the way.

    Raises:
        ArtifactError: the version exists; versions are immutable.
    """
    import tomli_w

    place = root / name / version
    if place.exists():
        raise ArtifactError(f"{place} exists, and versions are immutable; choose another version or remove it")
    place.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{WORK_PREFIX}{version}-", dir=place.parent))
    try:
        manifest = fill(work)
        files = {str(path.relative_to(work)): _record(path) for path in sorted(work.rglob("*")) if path.is_file()}
        document = msgspec.to_builtins(msgspec.structs.replace(manifest, files=files))
        (work / MANIFEST).write_text(tomli_w.dumps(document))
        digest = hashlib.sha256((work / MANIFEST).read_bytes()).hexdigest()
        (work / MANIFEST_SUM).write_text(f"{digest}  {MANIFEST}\n")
        work.chmod(0o755)
        for path in (*work.rglob("*"), work):
            _sync(path)
        work.rename(place)
        _sync(place.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return place


def read_manifest(folder: Path) -> Manifest:
    """model.toml of a version folder, held against its checksum; other files are not looked at.

    Raises:
        ArtifactError: not there, of another format, or altered.
    """
    try:
        raw = (folder / MANIFEST).read_bytes()
        expected = (folder / MANIFEST_SUM).read_text().split()[0]
    except (OSError, IndexError) as error:
        raise ArtifactError(f"{folder}: not a whole artifact: {error}") from error
    if hashlib.sha256(raw).hexdigest() != expected:
        raise ArtifactError(f"{folder / MANIFEST} does not match {MANIFEST_SUM}: it was cut or changed; build it again")
    try:
        document = tomllib.loads(raw.decode())
        if document.get("format") != FORMAT:
            raise ArtifactError(
                f"{folder} has artifact format {document.get('format')!r}; this rankd reads format {FORMAT}: "
                "build it again with this version"
            )
        return msgspec.convert(document, Manifest)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise ArtifactError(f"{folder / MANIFEST}: {error}; build it again") from error


def _verify(path: Path, name: str, record: FileRecord) -> None:
    try:
        size = path.stat().st_size
        whole = size == record.size_bytes
        found = (record if name.startswith(UNREAD) else _record(path)) if whole else None
    except OSError as error:
        raise ArtifactError(
            f"{path}: listed in {MANIFEST} but cannot be read: {error.strerror}; copy it again"
        ) from error
    if found is None:
        raise ArtifactError(f"{path} has {size} bytes, {MANIFEST} says {record.size_bytes}: it was cut; copy it again")
    if found.sha256 != record.sha256:
        raise ArtifactError(
            f"{path} does not match the checksum of {name} in {MANIFEST}: it was changed; copy it again"
        )


def _record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(digest, path.stat().st_size)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
