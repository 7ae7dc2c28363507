"""Every error that rankd raises on purpose, with the HTTP and gRPC codes that it becomes at the edge.

    RankdError
    ├── InvalidRequest          400  INVALID_ARGUMENT     the caller can mend it: wrong type, shape, value, size
    │   ├── PayloadTooLarge     413  INVALID_ARGUMENT     the body or the candidate list is over a declared limit
    │   └── UnsupportedMedia    415  INVALID_ARGUMENT     the body's content type is not one that is read here
    ├── NotFound                404  NOT_FOUND            no such model, version or user
    ├── Unavailable             503  UNAVAILABLE          not ready, or draining
    │   ├── Overloaded          503  RESOURCE_EXHAUSTED   too much waits, or it would be late; carries retry_after_s
    │   ├── StoreFailure        503  UNAVAILABLE          the feature store did not do what was asked; carries trouble
    │   └── ShardFailure        503  UNAVAILABLE          a shard did not do what was asked; carries trouble
    ├── DeadlineExceeded        504  DEADLINE_EXCEEDED    timeout_ms ran out before the scores were there
    ├── EngineFailure           500  INTERNAL             the engine itself failed on a valid request
    ├── ConfigError              -   (start-up)           an unknown key or a bad value in a file, flag or variable
    ├── DataError                -   (offline)            the interaction log does not fit its description
    ├── ArtifactError            -   (start-up, load)     missing, truncated, altered or of another format
    ├── BuildError               -   (offline)            a model or a table that cannot be made as it was asked for
    ├── GateRefused              -   (offline)            a compressed model keeps less of its quality than was declared
    └── MissingExtra             -   (start-up)           the command needs an optional dependency

A message says what was given, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import Enum


class RankdError(Exception):
    """The root. `http_status` and `grpc_code` say what the error becomes at the edge of a server."""

    http_status = 500
    grpc_code = "INTERNAL"


class InvalidRequest(RankdError):
    """The request cannot be served as it is; the caller can mend it."""

    http_status = 400
    grpc_code = "INVALID_ARGUMENT"


class PayloadTooLarge(InvalidRequest):
    """A body or a list is over a declared limit."""

    http_status = 413


class UnsupportedMedia(InvalidRequest):
    """The body's content type is not read by this route."""

    http_status = 415


class NotFound(RankdError):
    """No model, version or user of that name."""

    http_status = 404
    grpc_code = "NOT_FOUND"


class Unavailable(RankdError):
    """The server or the model is loading or draining."""

    http_status = 503
    grpc_code = "UNAVAILABLE"


class Overloaded(Unavailable):
    """Too much waits, or a deadline could not be kept. `retry_after_s` is when that is likely to be over."""

    grpc_code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Trouble(Enum):
    """What is wrong with a feature store or a shard."""

    DOWN = "down"  # nobody answers at its address
    TIMEOUT = "timeout"  # it did not answer in time
    DENIED = "denied"  # it does not let us in: wrong password, user, certificate or plan
    FULL = "full"  # it takes no more writes
    EVICTING = "evicting"  # its memory policy may throw away histories, so that it cannot keep events
    BROKEN = "broken"  # it answered what cannot be read: another type of value, a damaged record


class StoreFailure(Unavailable):
    """A feature store could not do what was asked; `trouble` says why."""

    def __init__(self, message: str, trouble: Trouble = Trouble.DOWN) -> None:
        super().__init__(message)
        self.trouble = trouble


class ShardFailure(Unavailable):
    """A shard of embedding tables could not be asked or did not answer; `trouble` says why."""

    def __init__(self, message: str, trouble: Trouble = Trouble.DOWN) -> None:
        super().__init__(message)
        self.trouble = trouble


class DeadlineExceeded(RankdError):
    """The request's own time limit passed before its scores were there."""

    http_status = 504
    grpc_code = "DEADLINE_EXCEEDED"


class EngineFailure(RankdError):
    """The engine failed on a request that was valid."""


class ConfigError(RankdError):
    """A configuration file, an environment variable or a flag holds an unknown key or a bad value."""


class DataError(RankdError):
    """The interaction log and its description do not fit together."""


class ArtifactError(RankdError):
    """A model version on disk is missing, truncated, altered or written by another format."""


class BuildError(RankdError):
    """A model cannot be compiled for a target, its compiled scores differ from the reference, or a table cannot be kept
    in the storage that was asked for."""


class GateRefused(RankdError):
    """A compressed model keeps less of the original's quality than its recipe declares; nothing was written."""


class TargetMissed(RankdError):
    """No recipe that a search tried meets a target, or the gate's bounds; `nearest_point` names the one that comes
    nearest, if any was tried."""

    def __init__(self, message: str, nearest_point: str = "") -> None:
        super().__init__(message)
        self.nearest_point = nearest_point


class MissingExtra(RankdError):
    """A command needs a package that the base install does not bring."""

    def __init__(self, command: str, extra: str) -> None:
        super().__init__(f"`{command}` needs the optional packages of '{extra}'; run: pip install 'rankd[{extra}]'")


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`word` as a typing mistake: " Did you mean 'x'?" for the closest allowed word, or an empty string."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
