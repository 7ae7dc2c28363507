"""What a ranker and the process of one of its executors say to each other, as MessagePack, one message a datagram.

ranker                                     process
Start(artifact, configuration, ...)  ->
                                     <-    Started(target, precision, ...) or Failed
Encode | Extend | Score              ->    arrays named by where they lie in the shared file (`shared_file.py`)
                                     <-    Done (the outputs lie where the call said) or Failed
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from rankd.engine.backend import EngineConfig, StateType

MOST_BYTES = 1 << 17
"""Of a message: a call for eight users of a model with many inputs takes a tenth of that."""


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Where an array lies in the shared file: `offset` in bytes, `dtype` as NumPy writes it ("<f4")."""

    offset: int
    dtype: str
    shape: tuple[int, ...]


Places = Mapping[str, Place]


class Start(msgspec.Struct, frozen=True, array_like=True, tag="start"):
    """Compile an artifact for one executor, on `cpus` (empty: any)."""

    artifact: str
    config: EngineConfig
    state_type: StateType | None
    cpus: tuple[int, ...]


class Encode(msgspec.Struct, frozen=True, array_like=True, tag="encode"):
    """`Executor.encode`; the state goes to `into`."""

    history: dict[str, Place]
    into: dict[str, Place]
    wide: bool


class PlacedState(msgspec.Struct, frozen=True, array_like=True):
    """A `UserState`."""

    arrays: dict[str, Place]
    lengths: tuple[int, ...]


class Extend(msgspec.Struct, frozen=True, array_like=True, tag="extend"):
    """`Executor.extend`; what it adds goes to `into`."""

    state: PlacedState
    new: dict[str, Place]
    into: dict[str, Place]


class Score(msgspec.Struct, frozen=True, array_like=True, tag="score"):
    """`Executor.score`; the logits go to `into`."""

    states: tuple[PlacedState, ...]
    candidates: dict[str, Place]
    into: Place


class Started(msgspec.Struct, frozen=True, array_like=True, tag="started"):
    """The executor is there. `memory_bytes` are those of its weights."""

    target: str
    precision: str
    state_type: StateType
    memory_bytes: int


class Done(msgspec.Struct, frozen=True, array_like=True, tag="done"):
    """The outputs are where the call wanted them."""


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """It raised: the name of a class of `errors.py`, and what it said."""

    kind: str
    message: str


Request = Start | Encode | Extend | Score
Reply = Started | Done | Failed
encode = msgspec.msgpack.Encoder().encode
read_request = msgspec.msgpack.Decoder(Request).decode
read_reply = msgspec.msgpack.Decoder(Reply).decode
