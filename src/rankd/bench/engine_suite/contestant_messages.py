"""Who takes part in the suite `engine`, and what is said through the pipes of a contestant's process.

Commands are Load, Score and Time; replies are Loaded, Scored, Timed and Refused. Each message is a frame: its length as
8 bytes, little-endian, then MessagePack. Next: `contestants.py` obeys, `contestant_process.py` asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import IO

import msgspec
import numpy as np

from rankd.engine.backend import Precision
from rankd.engine.targets import PRECISIONS, TARGETS
from rankd.errors import ConfigError
from rankd.types import Array, Features

LENGTH_BYTES = 8
APPENDED = 8
"""New events of a user that `Work.EXTEND` appends to a state."""

GPU = "cuda"
"""The target of whoever computes on the GPU."""

OWN = tuple(
    (target, precision)
    for target in TARGETS
    for precision in (Precision.FP32, Precision.BF16)
    if precision in PRECISIONS[target]
)
"""Targets and precisions of our own engine."""


class Family(Enum):
    """Who computes. Our own engine and, on a processor, `compile` run the split model; the others are torch and exports
    of it under one dense mask: `sdpa` and `flex` with a fused attention, `tensorrt` by way of ONNX Runtime."""

    EAGER = "eager"
    SDPA = "sdpa"
    FLEX = "flex"
    ORT = "ort"
    TENSORRT = "tensorrt"
    OPENVINO = "openvino"
    COMPILE = "compile"
    RANKD = "rankd"


class Work(Enum):
    """What one call does: all of a request, the candidates over a state that is kept, the state alone, or what new
    events add to it."""

    COLD = "cold"
    WARM = "warm"
    ENCODE = "encode"
    EXTEND = "extend"


@dataclass(frozen=True, slots=True)
class Contestant:
    """One row of the report. `fast`: in a process where MKL takes any processor for one of Intel's; `target`: ours; of
    others GPU if they run on one."""

    family: Family
    precision: Precision
    work: Work = Work.COLD
    fast: bool = False
    target: str = ""

    @property
    def process(self) -> str:
        """The process that it runs in; contestants of the same family and precision share one."""
        own = f"{self.target}-" if self.target else ""
        return f"{self.family.value}-{own}{self.precision.value}" + ("-fast" if self.fast else "")

    @property
    def name(self) -> str:
        """As it is called on the command line and in the report."""
        return self.process if self.family is not Family.RANKD else f"{self.process}-{self.work.value}"

    @property
    def is_baseline(self) -> bool:
        """Torch as it comes: what speed-ups are over, and no rival."""
        return self.family is Family.EAGER and (self.precision is Precision.FP32 or self.target == GPU)


CONTESTANTS = {
    one.name: one
    for one in (
        *(Contestant(Family.EAGER, p, fast=fast) for p in (Precision.FP32, Precision.BF16) for fast in (False, True)),
        *(Contestant(Family.COMPILE, Precision.BF16, fast=fast) for fast in (False, True)),
        Contestant(Family.ORT, Precision.FP32),
        *(Contestant(Family.OPENVINO, p) for p in (Precision.FP32, Precision.BF16)),
        *(
            Contestant(family, p, target=GPU)
            for family in (Family.EAGER, Family.COMPILE, Family.SDPA, Family.FLEX)
            for p in (Precision.FP32, Precision.BF16)
        ),
        *(Contestant(family, Precision.FP32, target=GPU) for family in (Family.ORT, Family.TENSORRT)),
        *(Contestant(Family.RANKD, p, work, target=target) for target, p in OWN for work in Work),
    )
}


class Packed(msgspec.Struct, frozen=True):
    """An array on its way through a pipe."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Inputs(msgspec.Struct, frozen=True):
    """`Features` on their way through a pipe: of one user (B = 1), or of several together."""

    history: dict[str, Packed]
    candidates: dict[str, Packed]
    num_candidates: int


class Load(msgspec.Struct, frozen=True, tag=True):
    """The first command: what to run, over which requests. `scratch` is for exports; processes of a run share it."""

    family: Family
    precision: Precision
    target: str
    threads: int
    artifact: str
    scratch: str
    requests: list[Inputs]


class Score(msgspec.Struct, frozen=True, tag=True):
    """Compute the logits of every request."""

    work: Work


class Time(msgspec.Struct, frozen=True, tag=True):
    """One call that does not count, then so many that do, over the requests in turn."""

    work: Work
    calls: int


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """Ready; `load_s` from the command."""

    load_s: float


class Scored(msgspec.Struct, frozen=True, tag=True):
    """Logits (B, C, K) float32 of every request, without padding."""

    logits: list[Packed]


class Timed(msgspec.Struct, frozen=True, tag=True):
    """How long each call took."""

    calls_ms: list[float]


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The command could not be done, and why."""

    reason: str


Command = Load | Score | Time
Reply = Loaded | Scored | Timed | Refused


def pack(array: Array) -> Packed:
    """An array as it travels."""
    return Packed(array.dtype.str, array.shape, array.tobytes())


def unpack(packed: Packed) -> Array:
    """The array again; a copy, for torch and OpenVINO want arrays that may be written to."""
    return np.frombuffer(packed.data, packed.dtype).reshape(packed.shape).copy()


def pack_features(features: Features) -> Inputs:
    """Features as they travel."""
    history, candidates = (
        {name: pack(array) for name, array in arrays.items()} for arrays in (features.history, features.candidates)
    )
    return Inputs(history, candidates, features.num_candidates)


def unpack_features(inputs: Inputs) -> Features:
    """The features again."""
    history, candidates = (
        {name: unpack(packed) for name, packed in arrays.items()} for arrays in (inputs.history, inputs.candidates)
    )
    return Features(history, candidates, inputs.num_candidates)


def together(requests: Sequence[Inputs], users: int) -> list[Inputs]:
    """Requests of one user each, `users` of them in one; what is left over is left out.

    Raises:
        ConfigError: they are not all of the same shapes.
    """
    if users == 1:
        return list(requests)
    features = [unpack_features(one) for one in requests]
    shapes = {tuple(array.shape for side in (f.history, f.candidates) for array in side.values()) for f in features}
    if len(shapes) > 1 or len({one.num_candidates for one in features}) > 1:
        raise ConfigError(
            f"{users} users in a call: the requests of this workload are of different sizes and make no batch; take "
            "one whose requests are all alike, such as base, long or hstu"
        )
    made = []
    for start in range(0, len(features) - users + 1, users):
        part = features[start : start + users]
        sides = ([one.history for one in part], [one.candidates for one in part])
        history, candidates = ({n: np.concatenate([one[n] for one in side]) for n in side[0]} for side in sides)
        made.append(pack_features(Features(history, candidates, part[0].num_candidates)))
    return made


def write_frame(pipe: IO[bytes], message: Command | Reply) -> None:
    """Send one message."""
    body = msgspec.msgpack.encode(message)
    pipe.write(len(body).to_bytes(LENGTH_BYTES, "little") + body)
    pipe.flush()
