"""How keys are named, the same in every store.

    rankd:m:<namespace>:<table>                what a table is (`table_meta.py`)
    rankd:r:<namespace>:<table>:<generation>:<id>   a packed row
    rankd:h:<namespace>:<user>                 a history record (`event_records.py`)

A namespace is the model's name unless configured. Ids are UTF-8 as they are; a key longer than MAX_KEY_BYTES ends in
a hash of the whole, because LMDB takes 511 bytes at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import xxhash

from rankd.types import Array

MAX_KEY_BYTES = 480
_HASH_BYTES = 16


def meta_key(namespace: str, table: str) -> bytes:
    """What a table is."""
    return _bounded(f"rankd:m:{namespace}:{table}".encode())


def row_prefix(namespace: str, table: str, generation: int) -> bytes:
    """What all rows of one loading of a table begin with; `prefix + id` is a row's key (see `row_key`)."""
    return f"rankd:r:{namespace}:{table}:{generation}:".encode()


def row_key(prefix: bytes, identity: str) -> bytes:
    """A row."""
    return _bounded(prefix + identity.encode())


def history_prefix(namespace: str) -> bytes:
    """What all histories begin with."""
    return f"rankd:h:{namespace}:".encode()


def history_key(namespace: str, user_id: str) -> bytes:
    """A user's history."""
    return _bounded(history_prefix(namespace) + user_id.encode())


def hash_id(identity: str) -> int:
    """An id or a category as 64 bits, the same everywhere and always (XXH3); never 0, which stands for nothing.

    Of a million ids two are alike with a probability of 3e-8.
    """
    return xxhash.xxh3_64_intdigest(identity.encode()) or 1


def hash_ids(identities: Sequence[str]) -> Array:
    """(n,) uint64, the `hash_id` of each."""
    keys = np.fromiter(map(xxhash.xxh3_64_intdigest, map(str.encode, identities)), np.uint64, len(identities))
    keys[keys == 0] = 1
    return keys


def _bounded(key: bytes) -> bytes:
    if len(key) <= MAX_KEY_BYTES:
        return key
    return key[: MAX_KEY_BYTES - 2 * _HASH_BYTES] + blake2b(key, digest_size=_HASH_BYTES).hexdigest().encode()
