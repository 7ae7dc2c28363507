"""Who is let in: secrets, certificates, plans and nets."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from rankd.errors import ConfigError, ShardFailure, Trouble
from rankd.shards.frames import Kind
from rankd.shards.handshake import Challenge, Hello, Proof, Ready
from rankd.shards.shard_config import ShardClientConfig, ShardSecurity, ShardServerConfig
from rankd.shards.shard_layout import Net, ShardLayout
from rankd.shards.sharded_pooling import ShardedPooling
from rankd.shards.streams import Stream
from rankd.shards.transport import parse_address
from tests.shards.false_shard import liar
from tests.shards.plain_tables import asking, jagged, make_server, one_shard, random_ids, serving, specs_of, whole
from tests.shards.raw_client import RawClient, raw

SECRET, OTHER = "a secret of sixteen", "another of sixteen"
LAYOUT = one_shard()
ASKED = jagged(["item"], [[[3], [4, 4]]])


def client_config(security: ShardSecurity) -> ShardClientConfig:
    """Tries often."""
    return ShardClientConfig(timeout_ms=30_000, security=security, first_wait_seconds=0.01, connect_seconds=1.0)


def reached_at(address: str, layout: ShardLayout) -> ShardLayout:
    """With the address of its only shard."""
    return msgspec.structs.replace(layout, shards=(msgspec.structs.replace(layout.shards[0], addresses=(address,)),))


def check_answers(layout: ShardLayout, server: ShardSecurity, client: ShardSecurity) -> None:
    """They let each other in, and sums are right."""
    with serving(make_server(layout, config=ShardServerConfig(security=server))) as (address,):
        reached = msgspec.structs.replace(
            layout, shards=(msgspec.structs.replace(layout.shards[0], addresses=(address,)),)
        )
        with asking(reached, client_config(client)) as pooling:
            asked = random_ids(layout, 2000, 1)
            np.testing.assert_allclose(pooling.pool(asked), whole(layout).pool(asked), rtol=1e-4, atol=1e-5)


def refusal(address: str, security: ShardSecurity, layout: ShardLayout = LAYOUT) -> ShardFailure:
    """Why a client does not get in."""
    pooling = ShardedPooling(reached_at(address, layout), client_config(security))
    pooling.start()
    try:
        with pytest.raises(ShardFailure) as caught:
            pooling.wait_up(0.5)
        return caught.value
    finally:
        pooling.close()


def test_with_the_same_secret_both_get_in() -> None:
    check_answers(LAYOUT, ShardSecurity(secret=SECRET), ShardSecurity(secret=SECRET))


@pytest.mark.parametrize(
    ("server", "client", "words"),
    [
        (SECRET, OTHER, "the client has none or another"),
        (SECRET, "", "the client has none or another"),
        ("", SECRET, "does not know the secret"),
    ],
)
def test_with_different_secrets_nobody_gets_in(server: str, client: str, words: str) -> None:
    config = ShardServerConfig(security=ShardSecurity(secret=server))
    with serving(make_server(LAYOUT, config=config)) as (address,):
        failure = refusal(address, ShardSecurity(secret=client))
        assert words in str(failure)
        assert failure.trouble is Trouble.DENIED


def test_a_proof_that_was_heard_is_of_no_use_again() -> None:
    config = ShardServerConfig(security=ShardSecurity(secret=SECRET))
    hello = msgspec.msgpack.encode(Hello(LAYOUT.plan, bytes(32)))
    with serving(make_server(LAYOUT, config=config)) as (address,):
        nonces = []
        for _ in range(2):
            with raw(address) as client:
                client.send(Kind.HELLO, 0, hello)
                challenge = msgspec.msgpack.decode(client.next()[2], type=Challenge)
                assert challenge.secret
                nonces.append(challenge.nonce)
                client.send(Kind.PROOF, 0, msgspec.msgpack.encode(Proof(bytes(32))))
                _, error = client.next_error()
                assert "another" in str(error)
                assert LAYOUT.plan not in str(error)  # nothing is told to who is not let in
        assert nonces[0] != nonces[1]


def test_a_server_cannot_show_the_clients_own_proof_as_its_own() -> None:
    def mirror(stream: Stream) -> None:
        client = RawClient(stream)
        nonce = msgspec.msgpack.decode(client.next()[2], type=Hello).nonce
        client.send(Kind.CHALLENGE, 0, msgspec.msgpack.encode(Challenge(nonce, True)))
        proof = msgspec.msgpack.decode(client.next()[2], type=Proof).proof
        nets = LAYOUT.served_by(LAYOUT.shards[0])
        client.send(Kind.READY, 0, msgspec.msgpack.encode(Ready(LAYOUT.plan, proof, nets, 1 << 20)))
        client.next()

    with liar(mirror) as address:
        assert "does not know the secret" in str(refusal(address, ShardSecurity(secret=SECRET)))


def test_a_client_of_another_plan_is_refused_with_both_names() -> None:
    with serving(make_server(LAYOUT)) as (address,):
        failure = refusal(address, ShardSecurity(), msgspec.structs.replace(LAYOUT, plan="plan-9"))
        assert "has plan 'plan-1', and the client asks for plan 'plan-9'" in str(failure)
        assert failure.trouble is Trouble.DENIED


def test_a_shard_of_the_plan_that_serves_something_else_is_not_asked() -> None:
    spec = msgspec.structs.replace(specs_of(LAYOUT)["item"], dim=8)
    wider = msgspec.structs.replace(LAYOUT, nets=(Net("items", (spec,)),))
    with serving(make_server(LAYOUT)) as (address,):
        failure = refusal(address, ShardSecurity(), wider)
        assert "item 0 of 1 (101 x 4)" in str(failure)
        assert "item 0 of 1 (101 x 8)" in str(failure)


@pytest.mark.parametrize(
    ("security", "words"),
    [
        (ShardSecurity(secret="short"), "has 5 characters"),
        (ShardSecurity(tls_cert="cert.pem"), "all or none"),
        (ShardSecurity(tls_cert="no.pem", tls_key="no.pem", tls_ca="no.pem"), "No such file"),
    ],
)
def test_security_that_is_none_is_refused_on_both_sides(security: ShardSecurity, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_server(LAYOUT, config=ShardServerConfig(security=security))
    with pytest.raises(ConfigError, match=words):
        ShardedPooling(LAYOUT, ShardClientConfig(security=security))


@pytest.mark.parametrize("address", ["host", "host:", ":80", "host:0", "host:70000", "host:x", "h..h:80"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        parse_address(address)
    assert parse_address("[::1]:80") == ("::1", 80)


def make_certificate(folder: Path, name: str, authority: str | None) -> ShardSecurity:
    """A key and a certificate for 127.0.0.1, signed by an authority of the same folder or by itself."""
    key, cert, request, more = (folder / f"{name}.{end}" for end in ("key", "pem", "csr", "ext"))
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", request, "-subj", f"/CN={name}")
    if authority is None:
        more.write_text("basicConstraints=critical,CA:TRUE\nkeyUsage=keyCertSign\nsubjectKeyIdentifier=hash\n")
        openssl("x509", "-req", "-in", request, "-signkey", key, "-out", cert, "-extfile", more)
        return ShardSecurity()
    more.write_text("subjectAltName=IP:127.0.0.1\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n")
    signer = folder / f"{authority}.pem"
    openssl(
        "x509", "-req", "-in", request, "-CA", signer, "-CAkey", folder / f"{authority}.key", "-CAcreateserial",
        "-out", cert, "-extfile", more,
    )  # fmt: skip
    return ShardSecurity(tls_cert=str(cert), tls_key=str(key), tls_ca=str(signer))


def openssl(*arguments: str | Path) -> None:
    """Run it."""
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardSecurity]:
    """Of a shard and a client of one authority, and of a stranger's."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command to make certificates with")
    folder = tmp_path_factory.mktemp("certificates")
    made = {}
    for authority, names in (("ours", ("shard", "client")), ("theirs", ("stranger",))):
        make_certificate(folder, authority, None)
        made.update({name: make_certificate(folder, name, authority) for name in names})
    return made


def test_with_certificates_of_one_authority_both_get_in(certificates: dict[str, ShardSecurity]) -> None:
    check_answers(LAYOUT, certificates["shard"], certificates["client"])
    both = [msgspec.structs.replace(certificates[name], secret=SECRET) for name in ("shard", "client")]
    check_answers(LAYOUT, *both)


def test_requests_in_both_directions_at_once_over_tls(certificates: dict[str, ShardSecurity]) -> None:
    config = ShardServerConfig(security=certificates["shard"])
    with serving(make_server(LAYOUT, config=config)) as (address,):
        layout = one_shard(address)
        with asking(layout, client_config(certificates["client"])) as pooling:
            asked = [random_ids(layout, 500, seed) for seed in range(20)]
            pending = [pooling.begin([one]) for one in asked]
            for one, sums in zip(asked, pending, strict=True):
                np.testing.assert_allclose(sums.result()[0].values, whole(layout).pool(one), rtol=1e-4, atol=1e-5)


def test_strangers_do_not_get_in(certificates: dict[str, ShardSecurity]) -> None:
    config = ShardServerConfig(security=certificates["shard"])
    server = make_server(LAYOUT, config=config)
    with serving(server) as (address,):
        assert "certificate verify failed" in str(refusal(address, certificates["stranger"]))
        assert refusal(address, ShardSecurity()).trouble is Trouble.DOWN  # without TLS
        mixed = msgspec.structs.replace(certificates["stranger"], tls_ca=certificates["client"].tls_ca)
        assert isinstance(refusal(address, mixed), ShardFailure)  # checks the server, and is not known to it
        assert server.stats().requests["answered"] == 0
        with raw(address) as client:
            client.send_bytes(b"no TLS here at all")
            assert client_is_out(client.stream.receive)


def client_is_out(receive: object) -> bool:
    """Whether nothing but an end, or TLS's own words, comes."""
    assert callable(receive)
    try:
        while True:
            receive(memoryview(bytearray(100)), time.perf_counter() + 5.0)
    except TimeoutError:
        return False
    except (ConnectionError, ssl.SSLError):
        return True
