"""Workloads: what is asked of a server, as data. A TOML file of `workloads/` and a seed become requests.

In: `workloads/<name>.toml`. Out: `Workload`, and from it stored histories and RankRequests. Everything drawn follows
the seed, so that all contestants and all runs meet the same requests. Next: `synthetic_model.py` makes the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from rankd.bench.flops import Flops, ModelSizes, model_flops
from rankd.config import read_struct
from rankd.errors import ConfigError, nearest
from rankd.types import Int64Array, RankRequest

FOLDER = Path(__file__).parent / "workloads"
FLOPS_DRAWS = 10_000

Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]


class Fixed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="law", tag="fixed"):
    """Always the same number."""

    value: Count


class LogNormal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="law", tag="log-normal"):
    """exp(Normal(log median, sigma)), rounded, and clipped to minimum..maximum (as stores cut long histories)."""

    median: Positive
    sigma: Positive
    minimum: Count
    maximum: Count


class Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="law", tag="choice"):
    """One of `values`, each place of the list equally likely."""

    values: Annotated[tuple[Count, ...], Meta(min_length=1)]


class Share(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a mixture: uniform over the whole numbers minimum..maximum."""

    weight: Positive
    minimum: Count
    maximum: Count


class Mixture(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="law", tag="mixture"):
    """One of the shares by weight, then a number from it."""

    shares: Annotated[tuple[Share, ...], Meta(min_length=1)]


Law = Fixed | LogNormal | Choice | Mixture


class Users(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who asks: the user of rank r = 1..count with probability proportional to r ** -zipf_exponent."""

    count: Count
    zipf_exponent: Annotated[float, Meta(ge=0)]


class Buckets(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The padded shapes that the workload's own model is compiled for: T of a block, and C."""

    history: Annotated[tuple[Count, ...], Meta(min_length=1)]
    candidates: Annotated[tuple[Count, ...], Meta(min_length=1)]


class DeclaredExecutors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Executors of a kind that this machine need not have, for schedules in made-up time: a call takes `call_ms` and
    `row_ms` for each of its rows, whose users are at most `most_users`; encoding a history takes `encode_ms`."""

    name: Annotated[str, Meta(min_length=1)]
    count: Count
    call_ms: Annotated[float, Meta(ge=0)]
    row_ms: Positive
    encode_ms: Annotated[float, Meta(ge=0)]
    most_users: Count = 1


class Workload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of `workloads/`. `history` is the law of a user's stored events, of which each of the model's N blocks
    reads an N-th (a block is a behaviour, and behaviours alternate); `candidates` is the law of a request's C.
    Candidates are drawn evenly from `items` items, without repetition within a request. `executors` are of two kinds
    that serve it together in `rankd bench schedule --simulate`.
    """

    name: str
    use: str
    model: ModelSizes
    history: Law
    candidates: Law
    users: Users
    buckets: Buckets
    items: Count = 20_000
    seed: int = 1
    executors: tuple[DeclaredExecutors, ...] = ()

    @property
    def block_tokens(self) -> int:
        """T of the longest history, a block."""
        return self.buckets.history[-1]

    def flops(self) -> Flops:
        """The mean over the workload's requests; C and the history's length are independent."""
        random = np.random.default_rng(self.seed)
        events = draw(self.history, random, FLOPS_DRAWS)
        candidates = draw(self.candidates, random, FLOPS_DRAWS)
        total = Flops(0.0, 0.0, 0.0, 0.0)
        pairs, counts = np.unique(np.stack([events, candidates]), axis=1, return_counts=True)
        for n, c, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
            tokens = min(n / self.model.blocks, self.block_tokens)
            total = total + model_flops(self.model, tokens, c).scaled(count / FLOPS_DRAWS)
        return total


def workload_names() -> list[str]:
    """The packaged workloads."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_workload(name: str) -> Workload:
    """A packaged workload by its name, or a file that ends in .toml.

    Raises:
        ConfigError: no workload of that name, an unknown key, or a bad value.
    """
    if name.endswith(".toml"):
        return read_workload(Path(name))
    names = workload_names()
    if name not in names:
        raise ConfigError(f"unknown workload '{name}'; there is: {', '.join(names)}.{nearest(name, names)}")
    return read_workload(FOLDER / f"{name}.toml")


def read_workload(path: Path) -> Workload:
    """A workload file.

    Raises:
        ConfigError: unreadable, an unknown key, a bad value, or sizes that contradict each other.
    """
    workload = read_struct(Workload, path)
    _check(workload, path)
    return workload


def draw(law: Law, random: np.random.Generator, count: int) -> Int64Array:
    """(count,) int64 numbers that follow the law."""
    match law:
        case Fixed(value):
            return np.full(count, value, np.int64)
        case LogNormal(median, sigma, minimum, maximum):
            raw = np.rint(median * np.exp(sigma * random.standard_normal(count)))
            return np.clip(raw, minimum, maximum).astype(np.int64)
        case Choice(values):
            return np.asarray(values, np.int64)[random.integers(len(values), size=count)]
        case Mixture(shares):
            weights = np.asarray([share.weight for share in shares])
            which = random.choice(len(shares), count, p=weights / weights.sum())
            low, high = (np.asarray([getattr(s, end) for s in shares], np.int64) for end in ("minimum", "maximum"))
            return random.integers(low[which], high[which], endpoint=True)


def largest(law: Law) -> int:
    """The largest number that the law can give."""
    match law:
        case Fixed(value):
            return value
        case LogNormal(maximum=maximum):
            return maximum
        case Choice(values):
            return max(values)
        case Mixture(shares):
            return max(share.maximum for share in shares)


def zipf_ranks(users: Users, random: np.random.Generator, count: int) -> Int64Array:
    """(count,) int64 ranks from 0: returning users."""
    weights = np.arange(1, users.count + 1, dtype=np.float64) ** -users.zipf_exponent
    return random.choice(users.count, count, p=weights / weights.sum())


def draw_requests(
    workload: Workload, user_ids: Sequence[str], item_ids: Sequence[str], count: int, model: str = ""
) -> list[RankRequest]:
    """`count` requests of the workload; the same arguments give the same requests.

    `user_ids` are in order of popularity: the first one returns most often. Where there are fewer than the workload's,
    the law is that of as many as there are.

    Raises:
        ConfigError: no users, or fewer items than a request's candidates.
    """
    if not user_ids or len(item_ids) < largest(workload.candidates):
        raise ConfigError(
            f"workload '{workload.name}' asks for {largest(workload.candidates)} candidates of known users; the model "
            f"has {len(item_ids)} items and {len(user_ids)} users that fit"
        )
    random = np.random.default_rng(workload.seed)
    users = Users(min(workload.users.count, len(user_ids)), workload.users.zipf_exponent)
    ranks = zipf_ranks(users, random, count).tolist()
    sizes = draw(workload.candidates, random, count).tolist()
    return [
        RankRequest(
            user_id=user_ids[rank],
            candidates=tuple(item_ids[i] for i in random.choice(len(item_ids), size, replace=False).tolist()),
            model=model,
            request_id=f"{workload.name}-{number}",
        )
        for number, (rank, size) in enumerate(zip(ranks, sizes, strict=True))
    ]


def returning_share(requests: Sequence[RankRequest]) -> float:
    """The share of requests whose user came before: what a cache of states could hit at best."""
    return 1.0 - len({request.user_id for request in requests}) / len(requests)


def _check(workload: Workload, path: Path) -> None:
    for name, law in (("history", workload.history), ("candidates", workload.candidates)):
        ranges = law.shares if isinstance(law, Mixture) else (law,) if isinstance(law, LogNormal) else ()
        for part in ranges:
            if part.minimum > part.maximum:
                raise ConfigError(f"{path}: {name} has minimum {part.minimum} above maximum {part.maximum}")
    for name, sizes in (("history", workload.buckets.history), ("candidates", workload.buckets.candidates)):
        if list(sizes) != sorted(set(sizes)):
            raise ConfigError(f"{path}: buckets.{name} is {list(sizes)}; it has to ascend")
    if largest(workload.candidates) > workload.buckets.candidates[-1]:
        raise ConfigError(
            f"{path}: up to {largest(workload.candidates)} candidates are drawn, and the largest bucket holds "
            f"{workload.buckets.candidates[-1]}"
        )
    if workload.model.width % workload.model.heads:
        raise ConfigError(f"{path}: width {workload.model.width} is not a multiple of heads {workload.model.heads}")
