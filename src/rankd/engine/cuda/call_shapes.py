"""What calls send, as sections of one block, and how requests are written into it: `score` and `encode` / `extend`.

The pages come last, those that hold something first, so that no empty page travels. Worked example, pages of 64 tokens,
two users whose block 0 has 100 and 10 events: pages 0 and 1 are the first user's, page 2 the second one's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rankd.engine.cuda.call_staging import HOST_TYPES, Section, fill_tiles, rung, rung_of_users, tile_shape
from rankd.engine.cuda.climber_steps import Block
from rankd.engine.cuda.paged_states import pages_of
from rankd.errors import EngineFailure
from rankd.features.schema import FeatureSchema
from rankd.types import Array, UserState


@dataclass(frozen=True, slots=True)
class StateShape:
    """N blocks, L layers, A wide; S tokens a page, at most M pages a block; the type of keys and values."""

    blocks: int
    layers: int
    width: int
    page: int
    most_pages: int
    dtype: torch.dtype

    def sections(self, users: int) -> list[Section]:
        """Of the states of so many users; pages last."""
        pages = users * self.blocks * self.most_pages
        return [
            Section("known", (users, self.blocks)),
            Section("table", (users, self.blocks, self.most_pages)),
            Section("page_times", (pages, self.page)),
            Section("pages", (pages, self.layers, 2, self.page, self.width), self.dtype),
        ]


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
    return sections + state.sections(users)


def history_sections(schema: FeatureSchema, state: StateShape, rows: int, users: int, block: Block) -> list[Section]:
    """What `encode` and `extend` send for at most R new events a block of U users."""
    blocks = state.blocks
    sections = [
        Section("counts", (blocks,)),
        Section("tiles", (blocks, *tile_shape(rows, users, block.tile))),
        Section("row_times", (blocks, rows)),
        Section("ids", (blocks, rows, 2 + schema.item_columns)),
    ]
    if schema.event_values:
        sections.append(Section("numbers", (blocks, rows, len(schema.event_values)), torch.float32))
    return sections + state.sections(users)


@dataclass(frozen=True, slots=True)
class Bucket:
    """What one captured graph is for: R rows, U users."""

    rows: int
    users: int

    @classmethod
    def of(cls, rows: int, users: int) -> Bucket:
        """The smallest one that holds a call."""
        return cls(rung(rows), rung_of_users(users))


def write_pages(
    host: Mapping[str, Array], shape: StateShape, states: Sequence[Mapping[str, Array]], new: Array | None = None
) -> int:
    """Write states (their `lengths` tokens alone) and the table; returns how many pages hold something.

    `new` (U, N) says how many tokens more each block will get: they have pages too.

    Raises:
        EngineFailure: a history that is longer than the model's longest one, or a state of another type.
    """
    if wrong := {str(s["keys_values"].dtype) for s in states} - {str(host["pages"].dtype)}:
        raise EngineFailure(f"a state of type {', '.join(wrong)}; this executor's are {host['pages'].dtype}")
    lengths = np.array([state["lengths"][0] for state in states], np.int32)
    whole = lengths if new is None else lengths + new
    if int(whole.max(initial=0)) > shape.most_pages * shape.page:
        raise EngineFailure(
            f"a history of {int(whole.max())} tokens a block; this model has room for {shape.most_pages * shape.page}"
        )
    host["known"][: len(states)] = lengths
    table, times, pages, page = host["table"], host["page_times"], host["pages"], shape.page
    filled = 0
    for user, state in enumerate(states):
        for block, length in enumerate(lengths[user].tolist()):
            for number, start in enumerate(range(0, length, page)):
                end = min(start + page, length)
                table[user, block, number] = filled
                times[filled, : end - start] = state["times"][0, block, start:end]
                pages[filled, :, :, : end - start] = state["keys_values"][0, block, :, :, start:end]
                filled += 1
    behind = filled
    for user, block in np.ndindex(*whole.shape):
        for number in range(pages_of(int(lengths[user, block]), page), pages_of(int(whole[user, block]), page)):
            table[user, block, number] = behind
            behind += 1
    return filled


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


def write_events(
    host: Mapping[str, Array], shape: StateShape, histories: Sequence[Mapping[str, Array]], block: Block
) -> None:
    """Write the new events of U users (each B = 1), users one after the other, and their times into the pages."""
    counts = np.array([history["history_length"][0] for history in histories], np.int32)
    host["counts"][:] = counts.sum(0)
    for number in range(shape.blocks):
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
            moments = history["history_time"][taken]
            host["row_times"][number, part] = moments
            place = host["known"][user, number] + np.arange(count)
            pages = host["table"][user, number, place // shape.page]
            host["page_times"][pages, place % shape.page] = moments
            first += count


def write_whole(host: Mapping[str, Array], shape: StateShape, bucket: Bucket, block: Block) -> int:
    """Fill a bucket with nobody's rows: as many as it holds, over histories as long as there may be.

    What is measured on it is what a full call takes. Returns how many pages hold something, which is all of them.
    """
    longest = shape.most_pages * shape.page
    each = min(bucket.rows // bucket.users, longest)
    host["counts"][:] = each * bucket.users
    host["table"][...] = np.arange(host["table"].size).reshape(host["table"].shape)
    if "now" in host:
        fill_tiles(host["tiles"], [each] * bucket.users, block.tile)
        host["user_count"][:], host["known"][:] = bucket.users, longest
        host["user_of"][: each * bucket.users] = np.repeat(np.arange(bucket.users), each)
    else:
        for tiles in host["tiles"]:
            fill_tiles(tiles, [each] * bucket.users, block.tile)
        host["known"][:] = 0
    return len(host["pages"])


def no_states(shape: StateShape, users: int) -> list[dict[str, Array]]:
    """States without a token, for histories that are encoded from their beginning."""
    nothing = {
        "keys_values": np.zeros((1, shape.blocks, shape.layers, 2, 0, shape.width), HOST_TYPES[shape.dtype]),
        "times": np.zeros((1, shape.blocks, 0), np.int32),
        "lengths": np.zeros((1, shape.blocks), np.int32),
    }
    return [nothing] * users


def arrays_of(states: Sequence[UserState]) -> list[Mapping[str, Array]]:
    """The arrays of states."""
    return [state.arrays for state in states]
