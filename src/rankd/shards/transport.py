"""Where a shard may listen, and connections to it: TCP, with TLS on both sides' certificates where they are given."""

from __future__ import annotations

import ipaddress
import socket
import ssl

from rankd.errors import ConfigError
from rankd.shards.shard_config import SHORTEST_SECRET, ShardSecurity
from rankd.shards.streams import Stream

_BACKLOG = 128


def check_security(security: ShardSecurity) -> None:
    """Do nothing if it is whole.

    Raises:
        ConfigError: a short secret, or some files of TLS without the others.
    """
    if security.secret and len(security.secret) < SHORTEST_SECRET:
        raise ConfigError(
            f"security.secret has {len(security.secret)} characters, which can be guessed; give at least "
            f"{SHORTEST_SECRET} random ones"
        )
    files = (security.tls_cert, security.tls_key, security.tls_ca)
    if any(files) and not all(files):
        raise ConfigError(
            "security.tls_cert, tls_key and tls_ca are given all or none: both sides show a certificate, and check the "
            "other's"
        )


def listen(host: str, port: int, security: ShardSecurity) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: the address cannot be had, or is one that others reach while nothing keeps them out.
    """
    check_security(security)
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ConfigError(f"'{host}' is no address of this machine: {error}") from error
    if not (security.secret or security.tls_cert or ipaddress.ip_address(place[0]).is_loopback):
        raise ConfigError(
            f"a shard without secret and TLS listens on this machine only, and {host} can be reached from others: set "
            "security.secret or security.tls_*, or listen on 127.0.0.1"
        )
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigError(f"{host}:{port} cannot be listened on: {error.strerror or error}") from error
    return listening


def server_tls(security: ShardSecurity) -> ssl.SSLContext | None:
    """What a shard shows and checks; None without TLS.

    Raises:
        ConfigError: the files are not what they are to be.
    """
    return _context(ssl.PROTOCOL_TLS_SERVER, security)


def client_tls(security: ShardSecurity) -> ssl.SSLContext | None:
    """What a client shows and checks; None without TLS.

    Raises:
        ConfigError: the files are not what they are to be.
    """
    return _context(ssl.PROTOCOL_TLS_CLIENT, security)


def accepted(connected: socket.socket, tls: ssl.SSLContext | None) -> Stream:
    """A client's stream; with TLS its handshake is still to come.

    Raises:
        OSError: the client has gone again.
    """
    try:
        connected.setblocking(False)
        if tls is not None:
            connected = tls.wrap_socket(connected, server_side=True, do_handshake_on_connect=False)
        return Stream(connected)
    except OSError:
        connected.close()
        raise


def connect(address: str, tls: ssl.SSLContext | None, within_s: float) -> Stream:
    """A stream to "host:port"; with TLS its handshake is still to come.

    Raises:
        OSError: nobody answers there in time.
    """
    host, port = parse_address(address)
    connected = socket.create_connection((host, port), timeout=within_s)
    try:
        connected.setblocking(False)
        if tls is not None:
            connected = tls.wrap_socket(connected, server_hostname=host, do_handshake_on_connect=False)
        return Stream(connected)
    except OSError:  # it has gone again
        connected.close()
        raise


def parse_address(address: str) -> tuple[str, int]:
    """ "host:port" or "[address]:port" as both.

    Raises:
        ConfigError: it is neither.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        host.encode("idna")
        fits = bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16
    except UnicodeError:
        fits = False
    if not fits:
        raise ConfigError(f"'{address}' is no address of a shard; it is host:port, as 10.0.0.7:7400 or [fd00::7]:7400")
    return host, int(port)


def _context(kind: int, security: ShardSecurity) -> ssl.SSLContext | None:
    check_security(security)
    if not security.tls_cert:
        return None
    context = ssl.SSLContext(kind)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(
            security.tls_cert, security.tls_key, password=""
        )  # an encrypted key would ask a terminal
        context.load_verify_locations(security.tls_ca)
    except OSError as error:
        raise ConfigError(
            f"TLS with {security.tls_cert}, {security.tls_key} and {security.tls_ca} cannot be had: {error}"
        ) from error
    return context
