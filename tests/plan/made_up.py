"""Tables that are small enough to look at, and all kinds of them."""

from __future__ import annotations

from hypothesis import strategies as st

from rankd.embeddings.table_spec import TableSpec, TableStorage
from rankd.plan.cost_model import CostModel, LookupCost
from rankd.plan.table_plan import MemoryLimits
from rankd.plan.table_statistics import HOT_SHARES, TableLoad, TableStatistics

ROOMY = MemoryLimits(replicate_bytes=0)
FREE = CostModel(
    call_us=0,
    id_us=0,
    answer_byte_us=0,
    shard_call_us=0,
    shard_id_us=0,
    shard_answer_byte_us=0,
    lookups={storage: LookupCost(0, 0) for storage in TableStorage},
    pooled_value_us=0,
    dense_sample_us=0,
    wire_us=0,
    wire_bytes_us=1e300,
    loopback_us=0,
    main_cores=1,
    shard_cores=1,
)
"""Nothing takes any time."""


def row_of_a_microsecond(byte_us: float = 0.0) -> dict[TableStorage, LookupCost]:
    """Every row that is looked up takes 1 us, whatever it is kept as, and its bytes so much each."""
    return {storage: LookupCost(1.0, byte_us) for storage in TableStorage}


def load_of(
    name: str,
    rows: int,
    dim: int = 4,
    lookups: float = 1.0,
    net: str = "all",
    hot: tuple[float, float, float, float] = HOT_SHARES,
) -> TableLoad:
    """A table in float32 and how it is asked."""
    return TableLoad(TableSpec(name, rows, dim), net, TableStatistics(name, lookups, min(lookups, 1.0), hot))


@st.composite
def some_loads(draw: st.DrawFn) -> list[TableLoad]:
    """One to six tables of one to 5,000 rows in up to three nets."""
    loads = []
    for number in range(draw(st.integers(1, 6))):
        spec = TableSpec(
            f"t{number}", draw(st.integers(1, 5000)), draw(st.integers(1, 64)), draw(st.sampled_from(TableStorage))
        )
        hot = sorted(draw(st.lists(st.floats(0, 1), min_size=4, max_size=4)))
        lookups = draw(st.floats(0, 100))
        statistics = TableStatistics(spec.name, lookups, min(lookups, 1.0), (hot[0], hot[1], hot[2], hot[3]))
        loads.append(TableLoad(spec, draw(st.sampled_from(["user", "item", "shop"])), statistics))
    return loads


sizes = st.none() | st.integers(0, 2_000_000)
some_limits = st.builds(
    MemoryLimits, sizes, sizes, replicate_bytes=st.integers(0, 20_000), hot_row_bytes=st.integers(0, 20_000)
)
