"""The schema of features: what a model reads about items, users, events and time.

It is written by training, carried by the artifact (`[schema]` of model.toml) and read by `assembly.py`, so that
the same code packs features for training and for serving.

Item rows: row 0 pads, row 1 is the item that nobody has heard of, real items follow from row 2.
"""

from __future__ import annotations

from enum import Enum

import msgspec

PADDING_ROW = 0
UNKNOWN_ROW = 1
FIRST_ITEM_ROW = 2

MATCH_FEATURES = (
    "seen",
    "count",
    "recency",
    "cadence",
    "affinity",
    "recent_affinity",
    "events",
    "idle",
)


class Strategy(Enum):
    """How a sub-sequence is extracted from a user's whole history (Climber's extraction strategies)."""

    RECENT = "recent"  # the newest events
    DISTINCT = "distinct"  # the newest event of every item, so that a long life fits into few tokens
    REPEATED = "repeated"  # the newest event of every item that came more than once
    EVENT = "event"  # the newest events of the given event types (behaviours)
    CATEGORY = "category"  # the newest events in the user's own most frequent values of a categorical column


class SubSequence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One extraction: a strategy and what it needs. `top` is the number of categories that `category` keeps."""

    strategy: Strategy
    events: tuple[str, ...] = ()
    column: str = ""
    top: int = 3


class Categorical(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A categorical column of `width` values a row (more than 1: multi-valued, 0-padded).

    Its `size` known values have the codes offset..offset + size - 1 in a table shared by all columns of the same
    side (items or users); code 0 means no value. The values themselves are the catalogue's vocabulary.
    """

    name: str
    offset: int
    size: int
    width: int = 1
    words: bool = False  # the raw value is a text whose words are the values


class Numeric(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A numeric column: the model sees (transform(x) - mean) / std; a missing value is seen as 0."""

    name: str
    mean: float = 0.0
    std: float = 1.0
    log1p: bool = False


class EmbeddedSide(Enum):
    """Whose rows an embedded feature pools."""

    ITEM = "item"  # the candidate's own row
    ITEM_COLUMN = "item_column"  # the values of one of its categorical columns
    ITEM_COLUMNS = "item_columns"  # those of all of them, which share a table
    USER_COLUMN = "user_column"  # the values of one of the user's
    USER_COLUMNS = "user_columns"  # those of all of them
    HISTORY = "history"  # the items of a sub-sequence
    EVENT_ITEM = "event_item"  # the item of each event of a history: what `encode` reads
    EVENT_COLUMNS = "event_columns"  # the values of all of its categorical columns


OF_REQUEST = (EmbeddedSide.USER_COLUMN, EmbeddedSide.USER_COLUMNS, EmbeddedSide.HISTORY)
OF_TOKEN = (EmbeddedSide.EVENT_ITEM, EmbeddedSide.EVENT_COLUMNS)


class EmbeddedFeature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A sum of rows of an embedding table that is not in the graph: looked up beside it, and one of its inputs.

    `index` counts the columns, or the sub-sequences, of its side. Row 0 of a table is nobody's: code 0 and padding are
    left out. A column's first value is row 1 of its table; where all columns share one, a code is its row.
    """

    table: str
    dim: int
    side: EmbeddedSide
    index: int = 0


class DefaultTime(Enum):
    """What "now" is for a request that does not say: the wall clock, or the end of the log (for old logs)."""

    WALL = "wall"
    LOG_END = "log_end"


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One output of the model. Candidates are ordered by the sum of rank_weight x score over the tasks."""

    name: str
    rank_weight: float = 1.0


class FeatureSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that assembly and a model's constructor need to know of the data.

    `num_item_rows` counts padding and unknown; `history_length` is T of every sub-sequence, `history_buckets` and
    `candidate_buckets` the shapes that are compiled and warmed; `stored_history` is how many events a store keeps.
    A sub-sequence that is full lets go of its oldest events `window_step` of the user's events at a time
    (`features.history`), so that between two such moments a history only grows.
    `time_origin` is the second (since 1970) from which the graph counts time, so that it fits int32.
    """

    num_item_rows: int
    event_types: tuple[str, ...]
    sub_sequences: tuple[SubSequence, ...]
    history_length: int
    history_buckets: tuple[int, ...]
    candidate_buckets: tuple[int, ...]
    tasks: tuple[Task, ...]
    stored_history: int = 1000
    window_step: int = 1
    item_categorical: tuple[Categorical, ...] = ()
    item_numeric: tuple[Numeric, ...] = ()
    user_categorical: tuple[Categorical, ...] = ()
    user_numeric: tuple[Numeric, ...] = ()
    event_values: tuple[Numeric, ...] = ()
    match: tuple[str, ...] = ()
    match_events: tuple[str, ...] = ()
    time_origin: int = 0
    log_end: int = 0
    default_time: DefaultTime = DefaultTime.WALL
    missing_item_score: float = -30.0
    embedded: tuple[EmbeddedFeature, ...] = ()

    @property
    def num_sub_sequences(self) -> int:
        """N."""
        return len(self.sub_sequences)

    @property
    def item_columns(self) -> int:
        """G of items: the widths of all categorical columns together."""
        return sum(column.width for column in self.item_categorical)

    @property
    def user_columns(self) -> int:
        """G of users."""
        return sum(column.width for column in self.user_categorical)

    @property
    def num_item_codes(self) -> int:
        """Rows of the shared embedding table of the items' categorical columns, code 0 included."""
        return 1 + sum(column.size for column in self.item_categorical)

    @property
    def num_user_codes(self) -> int:
        """Rows of the shared embedding table of the users' categorical columns, code 0 included."""
        return 1 + sum(column.size for column in self.user_categorical)

    @property
    def candidate_numeric(self) -> int:
        """F of candidates: the items' own numeric columns, then the match features."""
        return len(self.item_numeric) + len(self.match)

    @property
    def candidate_embedded(self) -> tuple[EmbeddedFeature, ...]:
        """What is looked up for each candidate, in the order of the columns of `candidate_embedded`."""
        return tuple(feature for feature in self.embedded if feature.side not in (*OF_REQUEST, *OF_TOKEN))

    @property
    def context_embedded(self) -> tuple[EmbeddedFeature, ...]:
        """What is looked up once for a request, in the order of the columns of `context_embedded`."""
        return tuple(feature for feature in self.embedded if feature.side in OF_REQUEST)

    @property
    def history_embedded(self) -> tuple[EmbeddedFeature, ...]:
        """What is looked up for each token of a history, in the order of the columns of `history_embedded`."""
        return tuple(feature for feature in self.embedded if feature.side in OF_TOKEN)

    @property
    def embedded_widths(self) -> dict[str, int]:
        """Numbers a row of each embedding table that is not in the graph, by name."""
        return {feature.table: feature.dim for feature in self.embedded}

    @property
    def max_candidates(self) -> int:
        """The longest candidate list a request may bring."""
        return self.candidate_buckets[-1]

    @property
    def task_names(self) -> tuple[str, ...]:
        """K names, in the order of the score columns."""
        return tuple(task.name for task in self.tasks)


class Dim(Enum):
    """A dimension that differs between requests; the others are fixed numbers."""

    B = "B"
    T = "T"
    C = "C"


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Name, NumPy dtype and shape of one graph input or output; a str in the shape is a Dim."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def history_specs(schema: FeatureSchema) -> tuple[TensorSpec, ...]:
    """The inputs of `encode`. Tokens are oldest first; those from `history_length` on are padding."""
    blocks = schema.num_sub_sequences
    specs = [
        TensorSpec("history_item", "int32", ("B", blocks, "T")),
        TensorSpec("history_event", "int32", ("B", blocks, "T")),
        TensorSpec("history_time", "int32", ("B", blocks, "T")),
        TensorSpec("history_length", "int32", ("B", blocks)),
    ]
    if schema.item_columns:
        specs.append(TensorSpec("history_categories", "int32", ("B", blocks, "T", schema.item_columns)))
    if schema.event_values:
        specs.append(TensorSpec("history_values", "float32", ("B", blocks, "T", len(schema.event_values))))
    if schema.history_embedded:
        specs.append(TensorSpec("history_embedded", "float32", ("B", blocks, "T", _width(schema.history_embedded))))
    return tuple(specs)


def candidate_specs(schema: FeatureSchema) -> tuple[TensorSpec, ...]:
    """The inputs of `score` beside the state: the candidates and the context of the request."""
    specs = [
        TensorSpec("candidate_item", "int32", ("B", "C")),
        TensorSpec("context_time", "int32", ("B",)),
    ]
    if schema.item_columns:
        specs.append(TensorSpec("candidate_categories", "int32", ("B", "C", schema.item_columns)))
    if schema.candidate_numeric:
        specs.append(TensorSpec("candidate_numeric", "float32", ("B", "C", schema.candidate_numeric)))
    if schema.user_columns:
        specs.append(TensorSpec("context_categories", "int32", ("B", schema.user_columns)))
    if schema.user_numeric:
        specs.append(TensorSpec("context_numeric", "float32", ("B", len(schema.user_numeric))))
    if schema.candidate_embedded:
        specs.append(TensorSpec("candidate_embedded", "float32", ("B", "C", _width(schema.candidate_embedded))))
    if schema.context_embedded:
        specs.append(TensorSpec("context_embedded", "float32", ("B", _width(schema.context_embedded))))
    return tuple(specs)


def graph_specs(schema: FeatureSchema, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """Of `history_specs` or `candidate_specs` those that are inputs of graphs: no ids where tables are outside."""
    return tuple(spec for spec in specs if not (schema.embedded and spec.name.endswith(("_item", "_categories"))))


def _width(features: tuple[EmbeddedFeature, ...]) -> int:
    return sum(feature.dim for feature in features)
