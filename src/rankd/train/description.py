"""The description of an interaction log: a TOML file that says what the columns mean. `interactions.py` reads by it."""

from __future__ import annotations

from enum import Enum

import msgspec

from rankd.features.schema import MATCH_FEATURES


class Columns(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which columns of the file are what. Without `basket`, events of a user at the same second form one; without
    `event`, every row is of `default_event`."""

    user: str
    item: str
    time: str
    basket: str = ""
    event: str = ""
    item_name: str = ""


class Action(Enum):
    """What a row rule does with the rows it takes."""

    DROP = "drop"
    ANONYMOUS = "anonymous"  # nobody's history, but still counted in the items' statistics
    EVENT = "event"  # kept, as an event of the rule's own type


class RowRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Takes the rows of which one column `matches` a regular expression, is `below` a number, or is `missing`."""

    name: str
    column: str
    action: Action
    matches: str = ""
    below: float | None = None
    missing: bool = False
    event: str = ""


class FeatureKind(Enum):
    """How a column is read: one category, the words of a text, or a number."""

    CATEGORICAL = "categorical"
    WORDS = "words"
    NUMERIC = "numeric"


class FeatureColumn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A column that describes an item or a user. `vocabulary` is how many values are kept, the most frequent first."""

    name: str
    column: str
    kind: FeatureKind
    width: int = 1
    vocabulary: int = 2000
    log1p: bool = False


class ValueColumn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A number that an event carries (a quantity, a watch time)."""

    name: str
    column: str
    log1p: bool = False


class TaskRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A label: 1 if the basket has an event of one of these types on the item, with `value` of `at_least` so much."""

    name: str
    events: tuple[str, ...]
    value: str = ""
    at_least: float = 0.0
    rank_weight: float = 1.0


class Split(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Dates (YYYY-MM-DD, UTC) that cut the log by time: train before the first, test from the second on."""

    train_until: str
    validate_until: str


class LogDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file. `history_events` are the types that enter histories, `match_events` those that match features
    count; empty means all."""

    name: str
    columns: Columns
    tasks: tuple[TaskRule, ...]
    split: Split
    default_event: str = "event"
    item_upper_case: bool = False
    rows: tuple[RowRule, ...] = ()
    item_features: tuple[FeatureColumn, ...] = ()
    user_features: tuple[FeatureColumn, ...] = ()
    event_values: tuple[ValueColumn, ...] = ()
    history_events: tuple[str, ...] = ()
    match_events: tuple[str, ...] = ()
    match: tuple[str, ...] = MATCH_FEATURES
    snapshot_days: int = 28
    num_neighbours: int = 64
    default_time: str = "wall"
