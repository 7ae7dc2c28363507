"""Where Redis is and how to be let in: a configuration becomes a `RedisAddress` and the options of its connections."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from redis.asyncio.connection import Connection, SSLConnection

from rankd.errors import ConfigError
from rankd.features.stores.store_config import StoreConfig, redacted

DEFAULT_PORT = 6379
SOCKET_READ_BYTES = 1 << 16

Place = tuple[str, int]
"""Host and port of one server."""


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """One server, or one of a cluster. `shown` is the URL without its password."""

    place: Place
    db: int
    user: str
    password: str
    cluster: bool
    tls: bool
    tls_ca: str
    tls_cert: str
    tls_key: str
    shown: str

    def connection_class(self) -> type[Connection]:
        """The kind of connection."""
        return SSLConnection if self.tls else Connection

    def connection_options(self, place: Place) -> dict[str, Any]:
        """What connections to a server are made with. They never time out on their own: whoever asks limits them."""
        options: dict[str, Any] = {
            "host": place[0],
            "port": place[1],
            "db": self.db,
            "username": self.user or None,
            "password": self.password or None,
            "protocol": 2,
            "socket_timeout": None,
            "socket_connect_timeout": None,
            "socket_read_size": SOCKET_READ_BYTES,
        }
        if self.tls:
            options |= {
                "ssl_ca_certs": self.tls_ca or None,
                "ssl_certfile": self.tls_cert or None,
                "ssl_keyfile": self.tls_key or None,
                "ssl_check_hostname": True,
            }
        return options


def address_of(config: StoreConfig) -> RedisAddress:
    """The address that a configuration names.

    Raises:
        ConfigError: the URL cannot be read, or a certificate of it.
    """
    shown = redacted(config.url)
    try:
        parts = urlsplit(config.url)
        place = (parts.hostname or "", parts.port or DEFAULT_PORT)
    except ValueError as error:
        raise ConfigError(f"store url {shown!r}: {error}; write redis://host:port/db") from error
    if not place[0] or parts.query or parts.fragment:
        raise ConfigError(
            f"store url {shown!r}: write redis://host:port/db and nothing behind it; user, password, tls_ca and time "
            "limits have keys of their own"
        )
    secure, _, kind = parts.scheme.partition("+")
    address = RedisAddress(
        place,
        _database(parts, shown, kind == "cluster"),
        config.user or unquote(parts.username or ""),
        config.password or unquote(parts.password or ""),
        kind == "cluster",
        secure == "rediss",
        config.tls_ca,
        config.tls_cert,
        config.tls_key,
        shown,
    )
    _check_certificates(address)
    return address


def _database(parts: SplitResult, shown: str, cluster: bool) -> int:
    text = parts.path.strip("/")
    if not text:
        return 0
    if not text.isdigit():
        raise ConfigError(f"store url {shown!r}: the path is {text!r}; it has to be the number of a database, as in /0")
    if cluster and int(text):
        raise ConfigError(f"store url {shown!r}: a cluster has database 0 only; leave out /{text}")
    return int(text)


def _check_certificates(address: RedisAddress) -> None:
    files = {"tls_ca": address.tls_ca, "tls_cert": address.tls_cert, "tls_key": address.tls_key}
    given = [name for name, path in files.items() if path]
    if not address.tls:
        if given:
            raise ConfigError(f"{', '.join(given)} and url {address.shown!r}: TLS needs rediss:// or rediss+cluster://")
        return
    if address.tls_key and not address.tls_cert:
        raise ConfigError(f"tls_key {address.tls_key!r} without tls_cert: a client's key needs its certificate")
    try:
        context = ssl.create_default_context(cafile=address.tls_ca or None)
        if address.tls_cert:
            context.load_cert_chain(address.tls_cert, address.tls_key or None)
    except OSError as error:  # of which SSLError is one
        named = ", ".join(f"{name} {files[name]!r}" for name in given)
        raise ConfigError(
            f"{named or 'TLS'}: {error}; they have to be readable PEM files that belong together"
        ) from error
