"""Redis behind TLS: certificates that are trusted, that are not, and that are asked for."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from rankd.errors import ConfigError
from rankd.features.stores.feature_store import StoreFailure, Trouble
from rankd.features.stores.open_store import open_store
from rankd.features.stores.store_config import StoreConfig
from tests.features.stores.conftest import PATIENT_MS
from tests.features.stores.redis_server import RedisServer, eventually
from tests.free_ports import free_port


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that is its own authority, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl on this machine")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = [
        openssl,
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=rankd",
    ]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *names], check=True, capture_output=True)
    return certificate, key


@pytest.fixture(params=["no", "yes"])
def server(
    request: pytest.FixtureRequest, tmp_path: Path, certificate: tuple[Path, Path]
) -> Iterator[tuple[str, bool]]:
    """The URL of a server that speaks TLS, and whether it asks its clients for a certificate."""
    port = free_port()
    files = ["--tls-cert-file", str(certificate[0]), "--tls-key-file", str(certificate[1])]
    trusted = ["--tls-ca-cert-file", str(certificate[0]), "--tls-auth-clients", request.param]
    made = RedisServer(tmp_path, "--tls-port", str(port), *files, *trusted)
    yield f"rediss://127.0.0.1:{made.start() and port}/0", request.param == "yes"
    made.close()


def test_tls(server: tuple[str, bool], certificate: tuple[Path, Path]) -> None:
    url, asks = server
    config = StoreConfig(url, tls_ca=str(certificate[0]), timeout_ms=PATIENT_MS, write_timeout_ms=PATIENT_MS)
    if asks:
        config = msgspec.structs.replace(config, tls_cert=str(certificate[0]), tls_key=str(certificate[1]))
    store = open_store(config)
    heard: list[bytes] = []
    store.listen(lambda key, new: heard.append(new))
    store.put([(b"a", bytes(300_000))]).result()
    assert store.get([b"a", b"none"]).result() == [bytes(300_000), None]
    eventually(store.listening, "it listens")
    store.close()


def test_a_certificate_that_is_not_trusted(server: tuple[str, bool], certificate: tuple[Path, Path]) -> None:
    url, asks = server
    store = open_store(StoreConfig(url, timeout_ms=PATIENT_MS, write_timeout_ms=PATIENT_MS))
    with pytest.raises(StoreFailure, match="set tls_ca") as failed:
        store.get([b"a"]).result()
    assert failed.value.trouble is Trouble.DENIED
    store.close()
    if not asks:
        return
    store = open_store(StoreConfig(url, tls_ca=str(certificate[0]), timeout_ms=PATIENT_MS, write_timeout_ms=PATIENT_MS))
    with pytest.raises(StoreFailure, match="tls_cert") as failed:
        store.get([b"a"]).result()
    assert failed.value.trouble in (Trouble.DENIED, Trouble.DOWN)  # the server hangs up, often before it says why
    store.close()


def test_tls_is_asked_for_without_tls(certificate: tuple[Path, Path], redis_server: RedisServer) -> None:
    url = redis_server.url.replace("redis:", "rediss:")
    store = open_store(StoreConfig(url, timeout_ms=300.0, write_timeout_ms=300.0))
    assert isinstance(store.get([b"a"]).exception(), StoreFailure)
    assert not store.health().up
    store.close()


def test_files_that_cannot_be_used(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"tls_ca '.*none'"):
        open_store(StoreConfig("rediss://h", tls_ca=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="readable PEM"):
        open_store(StoreConfig("rediss://h", tls_ca=str(tmp_path / "text")))
    with pytest.raises(ConfigError, match="without tls_cert"):
        open_store(StoreConfig("rediss://h", tls_key=str(certificate[1])))
    with pytest.raises(ConfigError, match="needs rediss"):
        open_store(StoreConfig("redis://h", tls_ca=str(certificate[0])))
