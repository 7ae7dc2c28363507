"""A configuration becomes a store. Only what its URL names is imported."""

from __future__ import annotations

from pathlib import Path

from rankd.errors import ConfigError, nearest
from rankd.features.stores.feature_store import FeatureStore
from rankd.features.stores.store_config import GIB, StoreConfig, redacted

REDIS_SCHEMES = ("redis", "rediss", "redis+cluster", "rediss+cluster")
ALLOWED = "memory:, lmdb:/folder, redis://host:port/db, rediss://, redis+cluster:// or rediss+cluster://"


def open_store(config: StoreConfig) -> FeatureStore:
    """The store that a configuration names. One in Redis connects in the background: it may be down at this moment.

    Raises:
        ConfigError: the URL is not that of a store, or a folder or certificate that it needs cannot be used.
    """
    scheme, _, place = config.url.partition(":")
    if scheme in ("", "memory") and not place:
        from rankd.features.stores.memory_store import MemoryStore

        return MemoryStore()
    if scheme == "lmdb" and place:
        from rankd.features.stores.lmdb_store import LmdbStore

        return LmdbStore(Path(place), config.map_gib * GIB)
    if scheme in REDIS_SCHEMES:
        from rankd.features.stores.redis_address import address_of
        from rankd.features.stores.redis_store import RedisStore

        return RedisStore(address_of(config), config)
    hint = nearest(scheme, ("memory", "lmdb", *REDIS_SCHEMES)) if scheme not in ("memory", "lmdb") else ""
    raise ConfigError(f"store url {redacted(config.url)!r}: no store is named so; write {ALLOWED}.{hint}")
