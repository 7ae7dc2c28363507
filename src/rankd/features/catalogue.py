"""The catalogue of one model version: the ids it knows and all it knows of them. The `tables/` of an artifact.

tables/items.safetensors      categories, numeric, neighbours, similarities (see ItemTable), by item row
tables/users.safetensors      categories, numeric; histories: offsets (U + 1), rows, events, times, values
tables/ids.json               item ids (row 2 on), item names, user ids, vocabularies of the categorical columns
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rankd.errors import ArtifactError
from rankd.features.schema import FIRST_ITEM_ROW, UNKNOWN_ROW, FeatureSchema
from rankd.features.stores.store_keys import hash_ids
from rankd.features.tables import ItemTable
from rankd.types import Array, Int32Array, Int64Array, UserHistory


class Ids(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """tables/ids.json. Vocabularies are keyed by "item.<column>" and "user.<column>"."""

    items: tuple[str, ...]
    item_names: tuple[str, ...]
    users: tuple[str, ...]
    vocabularies: dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class UserTable:
    """All users of an artifact: categories (U, G) int32, numeric (U, F) float32, and their histories end to end;
    user u's events are history[offsets[u]:offsets[u + 1]]."""

    categories: Int32Array
    numeric: Array
    offsets: Int64Array
    history: UserHistory

    def history_of(self, user: int) -> UserHistory:
        """The events of one user, as views."""
        start, end, whole = int(self.offsets[user]), int(self.offsets[user + 1]), self.history
        return UserHistory(
            whole.rows[start:end], whole.events[start:end], whole.times[start:end], whole.values[start:end]
        )


class Catalogue:
    """Ids to rows and back, the item table and the user table of one model version."""

    def __init__(self, ids: Ids, items: ItemTable, users: UserTable) -> None:
        self.ids, self.items, self.users = ids, items, users
        self._row_of = {item: row for row, item in enumerate(ids.items, start=FIRST_ITEM_ROW)}

    def rows_of(self, item_ids: Sequence[str]) -> Int32Array:
        """(C,) int32 rows; UNKNOWN_ROW for an id that the model has never heard of."""
        row_of = self._row_of
        return np.fromiter((row_of.get(item, UNKNOWN_ROW) for item in item_ids), np.int32, len(item_ids))

    def item_id(self, row: int) -> str:
        """The id of a row; an empty string for padding and the unknown item."""
        return self.ids.items[row - FIRST_ITEM_ROW] if row >= FIRST_ITEM_ROW else ""

    def item_name(self, row: int) -> str:
        """A name for people; an empty string where there is none."""
        return self.ids.item_names[row - FIRST_ITEM_ROW] if row >= FIRST_ITEM_ROW else ""

    def keys(self) -> Array:
        """(I,) uint64, the `hash_id` of each row's id, by which stores and caches know it; 0 for padding and
        unknown."""
        keys = np.zeros(len(self.ids.items) + FIRST_ITEM_ROW, np.uint64)
        keys[FIRST_ITEM_ROW:] = hash_ids(self.ids.items)
        return keys

    def vocabulary(self, side: str, column: str) -> tuple[str, ...]:
        """The known values of a categorical column; side is "item" or "user"."""
        return self.ids.vocabularies[f"{side}.{column}"]

    def save(self, folder: Path) -> None:
        """Write the files of `tables/` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        history = self.users.history
        save_file(
            _contiguous(
                {
                    "categories": self.items.categories,
                    "numeric": self.items.numeric,
                    "neighbours": self.items.neighbours,
                    "similarities": self.items.similarities,
                }
            ),
            folder / "items.safetensors",
        )
        save_file(
            _contiguous(
                {
                    "categories": self.users.categories,
                    "numeric": self.users.numeric,
                    "offsets": self.users.offsets,
                    "rows": history.rows,
                    "events": history.events,
                    "times": history.times,
                    "values": history.values,
                }
            ),
            folder / "users.safetensors",
        )
        (folder / "ids.json").write_bytes(msgspec.json.encode(self.ids))

    @classmethod
    def load(cls, folder: Path, schema: FeatureSchema) -> Catalogue:
        """Read `tables/`.

        Raises:
            ArtifactError: a file is missing or does not fit the schema.
        """
        try:
            ids = msgspec.json.decode((folder / "ids.json").read_bytes(), type=Ids)
            items = load_file(folder / "items.safetensors")
            users = load_file(folder / "users.safetensors")
            table = ItemTable(items["categories"], items["numeric"], items["neighbours"], items["similarities"])
            history = UserHistory(users["rows"], users["events"], users["times"], users["values"])
            people = UserTable(users["categories"], users["numeric"], users["offsets"], history)
        except (OSError, KeyError, msgspec.MsgspecError, SafetensorError) as error:
            raise ArtifactError(f"{folder}: tables cannot be read: {error}; build the artifact again") from error
        expected = (schema.num_item_rows, schema.item_columns)
        if table.categories.shape != expected or len(ids.items) + FIRST_ITEM_ROW != schema.num_item_rows:
            raise ArtifactError(
                f"{folder}: items are {table.categories.shape} with {len(ids.items)} ids, the schema says {expected}"
            )
        return cls(ids, table, people)


def _contiguous(arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}
