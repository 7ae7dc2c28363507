"""Where features come from, and what of them is kept next to the model."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import msgspec

from rankd.features.stores.store_config import StoreConfig

MIB = 1 << 20


class Mode(Enum):
    """What a request does about a row that is not here, or that is older than its table's TTL.

    SYNC waits for it, within the request's time; ASYNC answers from what is here (a stale row, or the artifact's own
    values) and has it fetched for the requests to come.
    """

    SYNC = "sync"
    ASYNC = "async"


class RowsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of rows. `budget_mib` is all the memory of its cache, taken at start; 0 keeps nothing. A row is fresh for
    `ttl_seconds` after it was read; that the store has no such row is believed for `absent_seconds`."""

    mode: Mode = Mode.SYNC
    ttl_seconds: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    absent_seconds: Annotated[float, msgspec.Meta(gt=0)] = 10.0
    budget_mib: Annotated[float, msgspec.Meta(ge=0)] = 64.0


class HistoriesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Histories of users. With SYNC each request asks a remote store whether the history that is here is the newest, so
    that an event is seen by the user's next request in whatever server process; with ASYNC it is kept current by what
    the store tells (milliseconds later), and asked for only while the store tells nothing."""

    mode: Mode = Mode.SYNC
    budget_mib: Annotated[float, msgspec.Meta(ge=0)] = 64.0


class FeatureConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The feature store of a server, and its tables.

    `namespace` is the model's name unless given. A request waits for the store `wait_ms` at most. `outbox` is a folder
    for events that the store has not confirmed: with it an event is acknowledged when it is on this disk, without it
    when the store has it. What was delivered stays there for `outbox_keep_seconds`, to be given again to a store that
    forgot it.
    """

    store: StoreConfig = StoreConfig()
    namespace: str = ""
    wait_ms: Annotated[float, msgspec.Meta(gt=0)] = 10.0
    items: RowsConfig = RowsConfig()
    users: RowsConfig = RowsConfig(budget_mib=16.0)
    histories: HistoriesConfig = HistoriesConfig()
    outbox: str = ""
    outbox_keep_seconds: Annotated[float, msgspec.Meta(ge=0)] = 600.0
