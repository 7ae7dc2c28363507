"""What calls send, as sections of one block, and how requests are written into it: `score` and `encode` / `extend`.

States are not among it: they are in the pool of `state_pool.py` before the call is computed, and what is sent is the
table of their pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rankd.engine.cuda.call_staging import Section, fill_tiles, rung, rung_of_users, tile_shape
from rankd.engine.cuda.paged_states import StateShape
from rankd.engine.cuda.pinned_memory import address_of
from rankd.engine.cuda.ranker_steps import Block
from rankd.engine.cuda.state_pool import PlacedState
from rankd.errors import EngineFailure
from rankd.features.schema import FeatureSchema
from rankd.types import Array, UserState


def score_sections(schema: FeatureSchema, state: StateShape, rows: int, users: int, block: Block) -> list[Section]:
    """What `score` sends for R rows of U users."""
    sections = [
        Section("counts", (state.blocks,)),
        Section("user_count", (1,)),
        Section("now", (users,)),
        Section("tiles", tile_shape(rows, users, block.tile)),
        Section("user_of", (rows,)),
        Section("ids", (1, rows, 1 + schema.item_columns)),
        Section("user_ids", (1, users, schema.user_columns)),
    ]
    if schema.candidate_numeric:
        sections.append(Section("numbers", (1, rows, schema.candidate_numeric), torch.float32))
    if schema.user_numeric:
        sections.append(Section("user_numbers", (1, users, len(schema.user_numeric)), torch.float32))
    return sections + table_sections(state, users)


def history_sections(schema: FeatureSchema, state: StateShape, rows: int, users: int, block: Block) -> list[Section]:
    """What `encode` and `extend` send for at most R new events a block of U users."""
    blocks = state.blocks
    sections = [
        Section("counts", (blocks,)),
        Section("tiles", (blocks, *tile_shape(rows, users, block.tile))),
        Section("row_times", (blocks, rows)),
        Section("ids", (blocks, rows, 2 + schema.item_columns)),
        Section("homes", (users, blocks), torch.int64),
        Section("apart", (users,)),
    ]
    if schema.event_values:
        sections.append(Section("numbers", (blocks, rows, len(schema.event_values)), torch.float32))
    return sections + table_sections(state, users)


def table_sections(state: StateShape, users: int) -> list[Section]:
    """Where the states of so many users are."""
    return [
        Section("known", (users, state.blocks)),
        Section("table", (users, state.blocks, state.most_pages)),
    ]


@dataclass(frozen=True, slots=True)
class Bucket:
    """What one captured graph is for: R rows, U users."""

    rows: int
    users: int

    @classmethod
    def of(cls, rows: int, users: int) -> Bucket:
        """The smallest one that holds a call."""
        return cls(rung(rows), rung_of_users(users))


def check_lengths(shape: StateShape, lengths: Array) -> None:
    """Refuse histories that are too long; lengths (U, N) int32.

    Raises:
        EngineFailure: it is longer than the model's longest one.
    """
    if (most := int(lengths.max(initial=0))) > shape.longest:
        raise EngineFailure(f"a history of {most} tokens a block; this model has room for {shape.longest}")


def check_types(expected: np.dtype[np.generic], states: Sequence[UserState]) -> None:
    """Refuse states of another type than the executor's.

    Raises:
        EngineFailure: names both.
    """
    if wrong := {str(state.arrays["keys_values"].dtype) for state in states} - {str(expected)}:
        raise EngineFailure(f"a state of type {', '.join(wrong)}; this executor's are {expected}")


def write_table(host: Mapping[str, Array], placed: Sequence[PlacedState], known: Array) -> None:
    """Write where the states of U users are, and how many of their tokens (U, N) are there already."""
    host["known"][: len(placed)] = known
    for user, state in enumerate(placed):
        for block, pages in enumerate(state.pages):
            host["table"][user, block, : len(pages)] = pages


def write_candidates(host: Mapping[str, Array], candidates: Mapping[str, Array], block: Block) -> None:
    """Write the candidates (B, C) of a call, users one after the other."""
    items = candidates["candidate_item"]
    users, count = items.shape
    rows = users * count
    host["counts"][:], host["user_count"][:] = rows, users
    host["now"][:users] = candidates["context_time"]
    fill_tiles(host["tiles"], [count] * users, block.tile)
    host["user_of"][:rows] = np.repeat(np.arange(users), count)
    host["ids"][0, :rows, 0] = items.reshape(-1)
    if "candidate_categories" in candidates:
        host["ids"][0, :rows, 1:] = candidates["candidate_categories"].reshape(rows, -1)
    if "numbers" in host:
        host["numbers"][0, :rows] = candidates["candidate_numeric"].reshape(rows, -1)
    if "context_categories" in candidates:
        host["user_ids"][0, :users] = candidates["context_categories"]
    if "user_numbers" in host:
        host["user_numbers"][0, :users] = candidates["context_numeric"]


def write_events(host: Mapping[str, Array], histories: Sequence[Mapping[str, Array]], block: Block) -> None:
    """Write the new events of U users (each B = 1), users one after the other."""
    counts = np.array([history["history_length"][0] for history in histories], np.int32)
    host["counts"][:] = counts.sum(0)
    for number in range(counts.shape[1]):
        fill_tiles(host["tiles"][number], counts[:, number].tolist(), block.tile)
        first = 0
        for user, history in enumerate(histories):
            count = int(counts[user, number])
            part, taken = slice(first, first + count), (0, number, slice(0, count))
            host["ids"][number, part, 0] = history["history_item"][taken]
            host["ids"][number, part, 1] = history["history_event"][taken]
            if "history_categories" in history:
                host["ids"][number, part, 2:] = history["history_categories"][taken]
            if "numbers" in host:
                host["numbers"][number, part] = history["history_values"][taken]
            host["row_times"][number, part] = history["history_time"][taken]
            first += count


def write_homes(host: Mapping[str, Array], homes: Sequence[Array | None]) -> None:
    """Write where the new tokens of U users go on the host: keys and values (1, N, L, 2, T, A) in locked memory. None:
    they leave with the others in one piece."""
    host["homes"][:] = 0
    for user, home in enumerate(homes):
        if home is not None:
            host["homes"][user] = address_of(home) + np.arange(home.shape[1]) * home.strides[1]
            host["apart"][user] = home.strides[3]


def write_whole(host: Mapping[str, Array], longest: int, bucket: Bucket, block: Block, pages: Sequence[int]) -> None:
    """Fill a bucket with nobody's rows: as many as it holds, over histories as long as there may be, in `pages`.

    What is measured on it is what a full call takes.
    """
    each = min(bucket.rows // bucket.users, longest)
    host["counts"][:] = each * bucket.users
    host["table"][...] = np.resize(np.asarray(pages, np.int32), host["table"].shape)
    if "now" in host:
        fill_tiles(host["tiles"], [each] * bucket.users, block.tile)
        host["user_count"][:], host["known"][:] = bucket.users, longest
        host["user_of"][: each * bucket.users] = np.repeat(np.arange(bucket.users), each)
    else:
        for tiles in host["tiles"]:
            fill_tiles(tiles, [each] * bucket.users, block.tile)
        host["known"][:] = 0
