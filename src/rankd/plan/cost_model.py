"""What calls, bytes and rows take: the components of every prediction and simulation here.

They come from a file, TOML or JSON (`rankd plan costs` measures and writes one), or are the defaults: figures of a
2-core machine with AVX512 (docs/log.md, "where embedding tables live"), and where it could not say, assumptions, marked
as such.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from rankd.embeddings.table_spec import TableSpec, TableStorage

Cost = Annotated[float, Meta(ge=0.0)]
Positive = Annotated[float, Meta(gt=0.0)]
Cores = Annotated[int, Meta(ge=1)]
MLPERF_SAMPLES = (100,) * 2 + (200,) * 12 + (300,) * 2 + (400, 500, 600, 700)
"""Quantiles of MLPerf dlrm-v2's requests: 270 samples in the mean."""
LOOPBACK_BYTES_US = math.inf
"""Within a machine bytes are copied, which is CPU and counted there."""


class LookupCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A row found and added, and with each of its bytes `byte_us`. Rows lie in more memory than caches hold."""

    row_us: Cost = 0.0122
    byte_us: Cost = 8.2e-6


class CostModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Microseconds of CPU unless said otherwise.

    call_us               a call of a shard, in the main server
    id_us, split_id_us    an id there: checked, its shard found, sent; and what one of a table in parts takes more
    answer_byte_us        a byte of an answer there: received and added
    sum_bytes             of a number in an answer: 4 in float32, 2 in bfloat16
    shard_call_us, shard_id_us, shard_answer_byte_us   the same in the shard: a call, an id read, a byte sent
    lookups               a row looked up and added, by the storage of its table; a storage that is not there costs as
                          LookupCost's defaults say: 70 M rows/s of 256 bytes and 78 M rows/s of 72 on one core
    pooled_value_us       a float32 of a pooled row, where it is made
    dense_us              all else of a request, and with each sample `dense_sample_us`: dlrm-v2's 32 MFLOP at the 490
                          GFLOP/s that a core does in bfloat16
    piece_samples         idle cores of a main server share the dense part of a request in pieces of a multiple of this
    wire_us               one way between two servers, no CPU; an assumption for one network switch
    wire_bytes_us         bytes a microsecond that a server's link takes; an assumption, 25 Gbit/s
    loopback_us           one way between two processes of one machine, no CPU
    main_cores, shard_cores  of a server; a piece of work in one server runs on one core
    machine_cores         if given, all servers are processes of one machine with so many cores, which they share; each
                          still uses as many at once as a server of its kind has
    rate                  requests a second, Poisson
    samples               of requests: these are equally likely
    """

    call_us: Cost = 15.0
    id_us: Cost = 4e-4
    split_id_us: Cost = 0.0
    answer_byte_us: Cost = 1.125e-4
    sum_bytes: Literal[2, 4] = 4
    shard_call_us: Cost = 15.0
    shard_id_us: Cost = 4e-4
    shard_answer_byte_us: Cost = 5e-5
    lookups: Mapping[TableStorage, LookupCost] = {}
    pooled_value_us: Cost = 2.5e-4
    dense_us: Cost = 0.0
    dense_sample_us: Cost = 65.0
    piece_samples: Cores = 100
    wire_us: Cost = 25.0
    wire_bytes_us: Positive = 3125.0
    loopback_us: Cost = 25.0
    main_cores: Cores = 8
    shard_cores: Cores = 8
    machine_cores: Cores | None = None
    rate: Positive = 100.0
    samples: Annotated[tuple[Cores, ...], Meta(min_length=1)] = MLPERF_SAMPLES

    @property
    def mean_samples(self) -> float:
        """Of a request."""
        return sum(self.samples) / len(self.samples)

    @property
    def way_us(self) -> float:
        """One way between a main server and a shard, without its bytes."""
        return self.wire_us if self.machine_cores is None else self.loopback_us

    @property
    def way_bytes_us(self) -> float:
        """Bytes a microsecond on that way."""
        return self.wire_bytes_us if self.machine_cores is None else LOOPBACK_BYTES_US

    def row_us(self, table: TableSpec) -> float:
        """A row of a table looked up and added."""
        cost = self.lookups.get(table.storage, LookupCost())
        return cost.row_us + table.row_bytes * cost.byte_us
