"""What calls, bytes and rows take: the components of every prediction and simulation here.

They come from a JSON or TOML file (measured where it will run), or are the defaults: figures of a 2-core machine with
AVX512 (docs/log.md, "Embeddings" and "A shard call"), and where it could not say, assumptions, marked as such.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Cost = Annotated[float, Meta(ge=0.0)]
Positive = Annotated[float, Meta(gt=0.0)]
Cores = Annotated[int, Meta(ge=1)]
MLPERF_SAMPLES = (100,) * 2 + (200,) * 12 + (300,) * 2 + (400, 500, 600, 700)
"""Quantiles of MLPerf dlrm-v2's requests: 270 samples in the mean."""


class CostModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Microseconds of CPU unless said otherwise.

    call_us             a call, on each of its two sides. A fan-out over framed TCP takes 86 / 155 / 342 us to 1 / 4 / 8
                        shards with the same bytes in all: 23 to 37 us for each one more, both sides together
    serialise_byte_us   a byte, on each side: what is left of those 86 us for 576 KiB
    lookup_us           a row looked up and added, and with each of its bytes `lookup_byte_us`: through 70 M rows/s of
                        256 bytes and 78 M rows/s of 72 (int8) on one core
    pooled_value_us     a float32 of a pooled row, where it is made and where it is joined: 16 GB/s
    dense_us            a request's dense part, and with each sample `dense_sample_us`: dlrm-v2's 32 MFLOP at the 490
                        GFLOP/s that a core does in bfloat16
    wire_us             one way between two servers, no CPU; an assumption for one network switch
    wire_bytes_us       bytes a microsecond that a server's link takes; an assumption, 25 Gbit/s
    main_cores, shard_cores  of a server; a request's work in one server runs on one core at a time
    rate                requests a second, Poisson
    samples             of requests: these are equally likely
    """

    call_us: Cost = 15.0
    serialise_byte_us: Cost = 5e-5
    lookup_us: Cost = 0.0122
    lookup_byte_us: Cost = 8.2e-6
    pooled_value_us: Cost = 2.5e-4
    dense_us: Cost = 0.0
    dense_sample_us: Cost = 65.0
    wire_us: Cost = 25.0
    wire_bytes_us: Positive = 3125.0
    main_cores: Cores = 8
    shard_cores: Cores = 8
    rate: Positive = 100.0
    samples: Annotated[tuple[Cores, ...], Meta(min_length=1)] = MLPERF_SAMPLES

    @property
    def mean_samples(self) -> float:
        """Of a request."""
        return sum(self.samples) / len(self.samples)
