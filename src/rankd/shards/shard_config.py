"""What can be set about shards: who is let in, what a shard takes, and how long a client waits for what."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import msgspec
from msgspec import Meta

from rankd.observe.tracing import TracingConfig

MIB = 1 << 20
SHORTEST_SECRET = 16

_Positive = Annotated[float, Meta(gt=0)]
_Bytes = Annotated[int, Meta(ge=1024, le=2**32 - 1)]


class ShardSecurity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who is let in. `secret`: both sides have to know it (at least 16 characters); it hides nothing of what is sent.

    `tls_cert`, `tls_key` and `tls_ca`, all or none: files of one's own certificate, its key, and of those who sign the
    other side's. Both sides show theirs, and everything is encrypted. With neither only this machine is talked to.
    """

    secret: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""


class ShardServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A shard: where it listens (port 0: a free one), and what it takes.

    `workers` threads pool, one for each core that is to work. At most `max_waiting` requests of `max_waiting_bytes`
    wait for them; one has at most `max_request_bytes` and is answered by at most `max_answer_bytes`. A client is let go
    that is not let in within `handshake_seconds`, stops within a frame for `frame_seconds`, or does not take an answer
    for `answer_seconds` (a worker waits for it). Draining takes at most `drain_seconds`.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 0
    workers: Annotated[int, Meta(ge=1)] = 2
    max_waiting: Annotated[int, Meta(ge=1)] = 256
    max_waiting_bytes: _Bytes = 256 * MIB
    max_connections: Annotated[int, Meta(ge=1)] = 256
    max_request_bytes: _Bytes = 64 * MIB
    max_answer_bytes: _Bytes = 256 * MIB
    handshake_seconds: _Positive = 5.0
    frame_seconds: _Positive = 5.0
    answer_seconds: _Positive = 0.5
    drain_seconds: _Positive = 30.0
    security: ShardSecurity = ShardSecurity()
    tracing: TracingConfig = TracingConfig()


class TableDefault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What stands in for a table that cannot be had: for the sum of a sample that has ids, `vector`, or zeros if it is
    empty. Samples without ids have zeros as ever."""

    table: str
    vector: tuple[float, ...] = ()


class SumFormat(Enum):
    """How shards send sums back. AUTO: BF16 where the engine computes in bfloat16, which rounds them in any case (of a
    table that is split, here each part by itself), and FP32 everywhere else."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


class ShardClientConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How shards are asked.

    A request without a deadline has `timeout_ms`. A table without one of `defaults` fails the request when it cannot be
    had. A call that is not answered within the `hedge_quantile` of recent ones (`hedge_least_ms` at least, half of its
    time at most) is sent to another replica too; at most a `hedge_share` of all calls are. After `misses_in_a_row`
    deadlines a replica is not asked until it answers anew; connecting is tried again after `first_wait_seconds`, then
    at twice the time up to `longest_wait_seconds`. A replica that says nothing for `heartbeat_seconds` is asked for a
    sign of life, and given up after as long again. An answer has at most `max_answer_bytes`, and its sums are in the
    format `sums`; a shard of an older rankd sends float32.
    """

    timeout_ms: _Positive = 50.0
    defaults: tuple[TableDefault, ...] = ()
    hedge_quantile: Annotated[float, Meta(gt=0, lt=1)] = 0.95
    hedge_least_ms: _Positive = 1.0
    hedge_share: Annotated[float, Meta(ge=0, le=1)] = 0.1
    misses_in_a_row: Annotated[int, Meta(ge=1)] = 3
    connect_seconds: _Positive = 2.0
    frame_seconds: _Positive = 5.0
    heartbeat_seconds: _Positive = 1.0
    first_wait_seconds: _Positive = 0.05
    longest_wait_seconds: _Positive = 2.0
    max_answer_bytes: _Bytes = 256 * MIB
    sums: SumFormat = SumFormat.AUTO
    security: ShardSecurity = ShardSecurity()
