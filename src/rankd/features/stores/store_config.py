"""Where features are kept, as it is configured; `open_store.py` opens it."""

from __future__ import annotations

from typing import Annotated

import msgspec

GIB = 1 << 30

_Positive = Annotated[float, msgspec.Meta(gt=0)]


class StoreConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A store and how long to wait for it.

    `url` is `memory:` (or empty), `lmdb:/folder`, `redis://host:port/db`, `rediss://` (TLS), or any one node of a
    cluster at `redis+cluster://` or `rediss+cluster://`. `user` and `password` may stand here instead of in the URL;
    they count more. `timeout_ms` is that of a read, `write_timeout_ms` that of a write; local stores take neither.
    `tls_ca` is a file of certificates to trust besides the system's; `tls_cert` and `tls_key` are what this client
    shows. `map_gib` bounds the folder of LMDB; it reserves addresses, not memory, and has to be the same in all
    processes.
    """

    url: str = ""
    user: str = ""
    password: str = ""
    timeout_ms: _Positive = 20.0
    write_timeout_ms: _Positive = 1000.0
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    max_connections: Annotated[int, msgspec.Meta(ge=1)] = 16
    map_gib: Annotated[int, msgspec.Meta(ge=1)] = 64


def redacted(url: str) -> str:
    """A URL that can be shown: without what stands before its `@`, save the name of a user who also has a password."""
    scheme, slashes, rest = url.partition("://")
    before, at, host = rest.rpartition("@")
    if not at:
        return url
    user, colon, _ = before.partition(":")
    return f"{scheme}{slashes}{user if colon else ''}{colon}***@{host}"
