"""The strategies: pure functions from tables, a number of shards and memory limits to a plan.

    singular            everything in every main process; no shards
    one-shard           everything in one shard
    capacity-balanced   the same bytes in every shard
    load-balanced       the same look-ups in every shard
    net-aware           a shard serves as few nets as possible, so that a request makes the fewest calls; then bytes

Small tables are replicated by all of them. Tables are split by row modulus where that makes them fit or balances
shards, into few parts: each sends back sums of its own. Without limits the heaviest shard has at most 1.25 fair shares
and one row, so 1.25 times the least possible: tables in a part for each shard weigh on all alike, other parts are a
quarter of a fair share at most, and shards differ by no more than a part (`part_packing.py`). Rows are taken as equally
hot in all parts of a table. Shards that would have nothing are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from rankd.embeddings.table_spec import TablePart, TableSpec, TableStorage
from rankd.errors import ConfigError
from rankd.plan.byte_sizes import show_bytes
from rankd.plan.hot_rows import spend_on_hot_rows
from rankd.plan.part_packing import Bin, Piece, pack
from rankd.plan.table_plan import MemoryLimits, Plan, Shard, Strategy, check_plan, part_bytes, show_shards
from rankd.plan.table_statistics import TableLoad, hot_share

GRAINS = (1, 2, 4)
WIDE = 5
"""Tables are cut into parts of a fair share, a half, a quarter, and up to so many heavy ones into a part a shard."""
ROUNDING = 1e-9
"""Of a part: a weight of just one share is one part, whatever the last digit says."""
BALANCED = 1.1
"""A shard may have so many times its fair share before tables are cut into more parts."""
Weights = Mapping[str, float]
"""What is balanced, of a whole table by its name."""


def make_plan(strategy: Strategy, loads: Sequence[TableLoad], num_shards: int, limits: MemoryLimits) -> Plan:
    """The plan of a strategy; `num_shards` says nothing to singular and one-shard.

    Raises:
        ConfigError: it does not fit the limits; the message has the numbers, and what would help.
    """
    specs = tuple(load.spec for load in loads)
    if strategy is Strategy.SINGULAR:
        _check_main(specs, limits)
        return Plan(strategy, specs, (), tuple(spec.name for spec in specs), (), limits)
    if num_shards < 1:
        raise ConfigError(f"{num_shards} shards; {strategy.value} needs one at least")
    replicated = _replicated(specs, limits)
    sharded = [load for load in loads if load.name not in replicated]
    hot_rows = spend_on_hot_rows(sharded, limits.hot_row_bytes)
    wanted = 1 if strategy is Strategy.ONE_SHARD else num_shards
    bins = PLACE[strategy](sharded, _lookups_left(sharded, {hot.table: hot.rows for hot in hot_rows}), wanted, limits)
    if bins is None:
        raise ConfigError(_refusal(strategy, sharded, wanted, limits))
    parts = [[part for piece in bin_.pieces for part in piece.parts] for bin_ in bins if bin_.pieces]
    order = {spec.name: number for number, spec in enumerate(specs)}
    shards = tuple(Shard(tuple(sorted(some, key=lambda part: order[part.table]))) for some in parts)
    plan = Plan(strategy, specs, shards, replicated, hot_rows, limits)
    check_plan(plan, strategy.value)
    return plan


def _by_bytes(loads: Sequence[TableLoad], lookups: Weights, num_shards: int, limits: MemoryLimits) -> list[Bin] | None:
    sizes = {load.name: float(load.spec.size_bytes) for load in loads}
    return _balanced(loads, sizes, num_shards, limits.shard_bytes)


def _by_lookups(
    loads: Sequence[TableLoad], lookups: Weights, num_shards: int, limits: MemoryLimits
) -> list[Bin] | None:
    return _balanced(loads, lookups, num_shards, limits.shard_bytes)


def _by_nets(loads: Sequence[TableLoad], lookups: Weights, num_shards: int, limits: MemoryLimits) -> list[Bin] | None:
    """Shards of their own for every net, or whole nets on shards where there are more nets than shards. If nets do not
    fit so, they share shards as if they were one."""
    nets: dict[str, list[TableLoad]] = {}
    for load in loads:
        nets.setdefault(load.net, []).append(load)
    found: list[Bin] | None = []
    if len(nets) > num_shards:
        found = pack([_whole(tables) for tables in nets.values()], num_shards, limits.shard_bytes)
    else:
        sizes = {net: float(sum(load.spec.size_bytes for load in tables)) for net, tables in nets.items()}
        for net, count in shards_of_nets(sizes, num_shards).items():
            some = _by_bytes(nets[net], lookups, count, limits)
            found = None if some is None or found is None else found + some
    return found if found is not None else _by_bytes(loads, lookups, num_shards, limits)


PLACE: Mapping[Strategy, Callable[[Sequence[TableLoad], Weights, int, MemoryLimits], list[Bin] | None]] = {
    Strategy.ONE_SHARD: _by_bytes,
    Strategy.CAPACITY_BALANCED: _by_bytes,
    Strategy.LOAD_BALANCED: _by_lookups,
    Strategy.NET_AWARE: _by_nets,
}


def shards_of_nets(weights: Weights, num_shards: int) -> dict[str, int]:
    """How many shards each net gets, one at least, so that the heaviest share of a net on a shard is the least."""
    counts = dict.fromkeys(weights, 1)
    for _ in range(num_shards - len(counts) if counts else 0):
        counts[max(counts, key=lambda net: weights[net] / counts[net])] += 1
    return counts


def _balanced(
    loads: Sequence[TableLoad], weights: Weights, num_shards: int, limit_bytes: int | None
) -> list[Bin] | None:
    """Shards of about the same weight, from the fewest parts that give it; None if nothing fits the limit."""
    fair = math.fsum(weights[load.name] for load in loads) / num_shards
    best: list[Bin] | None = None
    for moduli in _ways_to_cut(loads, weights, num_shards, limit_bytes):
        pieces = [piece for load in loads for piece in _cut(load.spec, weights[load.name], moduli[load.name])]
        bins = pack(pieces, num_shards, limit_bytes)
        if bins is not None and (best is None or _heaviest(bins) < _heaviest(best)):
            best = bins
        if best is not None and _heaviest(best) <= BALANCED * fair:
            return best
    if best is None:  # a part of every table in every shard: if that does not fit, nothing does
        every = [piece for load in loads for piece in _cut(load.spec, load.spec.size_bytes, num_shards)]
        best = pack(every, num_shards, limit_bytes)
    return best


def _ways_to_cut(
    loads: Sequence[TableLoad], weights: Weights, num_shards: int, limit_bytes: int | None
) -> list[dict[str, int]]:
    """Moduli of all tables, the fewest parts first: parts of at most a fair share, of a half and so on, and with each
    of them none to WIDE of the heaviest tables in as many parts as there are shards."""
    fair = math.fsum(weights[load.name] for load in loads) / num_shards
    most = {load.name: min(num_shards, load.spec.rows) for load in loads}
    heaviest = sorted(most, key=lambda name: -weights[name])
    ways = []
    for grain in GRAINS:
        moduli = {}
        for load in loads:
            by_weight = math.ceil(weights[load.name] * grain / fair - ROUNDING) if fair else 1
            by_bytes = -(-load.spec.size_bytes * grain // max(limit_bytes, 1)) if limit_bytes is not None else 1
            moduli[load.name] = min(max(by_weight, by_bytes, 1), most[load.name])
        ways += [moduli | {name: most[name] for name in heaviest[:wide]} for wide in range(WIDE + 1)]
    return sorted(ways, key=lambda moduli: sum(moduli.values()))


def _cut(spec: TableSpec, weight: float, modulus: int) -> list[Piece]:
    """A table in so many parts, or in as many as it has rows."""
    modulus = min(modulus, spec.rows)
    parts = [TablePart(spec.name, modulus, remainder) for remainder in range(modulus)]
    return [
        Piece((part,), frozenset({spec.name}), part_bytes(part, spec), weight * part.rows_of(spec) / spec.rows)
        for part in parts
    ]


def _whole(loads: Sequence[TableLoad]) -> Piece:
    """All tables of a net, together."""
    size = sum(load.spec.size_bytes for load in loads)
    return Piece(tuple(TablePart(load.name) for load in loads), frozenset(load.name for load in loads), size, size)


def _heaviest(bins: Sequence[Bin]) -> float:
    return max(bin_.weight for bin_ in bins)


def _lookups_left(loads: Sequence[TableLoad], cached: Mapping[str, int]) -> dict[str, float]:
    """Look-ups a sample that go to shards."""
    return {load.name: load.statistics.lookups * (1 - hot_share(load, cached.get(load.name, 0))) for load in loads}


def _replicated(specs: Sequence[TableSpec], limits: MemoryLimits) -> tuple[str, ...]:
    """Tables up to `replicate_bytes`, the smallest first, as many as fit the main process beside its hot rows."""
    room = math.inf if limits.main_bytes is None else limits.main_bytes - limits.hot_row_bytes
    if room < 0:
        raise ConfigError(
            f"{show_bytes(limits.hot_row_bytes)} for hot rows are more than the main process may have, "
            f"{show_bytes(limits.main_bytes or 0)}; give hot rows less"
        )
    taken = set()
    for spec in sorted(specs, key=lambda one: one.size_bytes):
        if spec.size_bytes <= limits.replicate_bytes and spec.size_bytes <= room:
            taken.add(spec.name)
            room -= spec.size_bytes
    return tuple(spec.name for spec in specs if spec.name in taken)


def _check_main(specs: Sequence[TableSpec], limits: MemoryLimits) -> None:
    size = sum(spec.size_bytes for spec in specs)
    if limits.main_bytes is not None and size > limits.main_bytes:
        raise ConfigError(
            f"singular needs {show_bytes(size)} in the main process, and {show_bytes(limits.main_bytes)} are allowed; "
            f"{_largest(specs)}; put tables on shards{_smaller(specs)}"
        )


def _refusal(strategy: Strategy, loads: Sequence[TableLoad], num_shards: int, limits: MemoryLimits) -> str:
    specs = [load.spec for load in loads]
    size, limit = sum(spec.size_bytes for spec in specs), limits.shard_bytes or 0
    needed = -(-size // limit) if limit else 0
    more = f"take {show_shards(max(needed, num_shards + 1))}" if limit else "give shards memory"
    return (
        f"{strategy.value} needs {show_bytes(size)} on {show_shards(num_shards)}, and {show_bytes(limit)} each are "
        f"allowed; {_largest(specs)}; {more}{_smaller(specs)}"
    )


def _largest(specs: Sequence[TableSpec]) -> str:
    largest = max(specs, key=lambda spec: spec.size_bytes)
    return f"the largest table is '{largest.name}' with {show_bytes(largest.size_bytes)}"


def _smaller(specs: Sequence[TableSpec]) -> str:
    """What int8 would save; nothing is said if it saves nothing."""
    int8 = [TableSpec(spec.name, spec.rows, spec.dim, TableStorage.INT8).size_bytes for spec in specs]
    size = sum(min(spec.size_bytes, other) for spec, other in zip(specs, int8, strict=True))
    return f", or keep tables as int8, {show_bytes(size)} in all" if size < sum(s.size_bytes for s in specs) else ""
