"""What Redis, its connections and their library complain of, as a StoreFailure that says what to do."""

from __future__ import annotations

import ssl
from typing import NamedTuple

from redis import exceptions as complaints

from rankd.features.stores.feature_store import StoreFailure, Trouble


class _Rule(NamedTuple):
    """An error of a class, with a word in its text if one is given. `severs`: nothing else will work either."""

    kind: type[Exception]
    word: str
    trouble: Trouble
    severs: bool
    advice: str


_UNREACHED = "see that it runs and can be reached from here, and whether it wants TLS (rediss://, tls_cert)"
_STRANGE = "the key holds what rankd did not write; delete it"
# The first that fits counts. Scripts report the errors of their commands with words before them.
_RULES = (
    _Rule(complaints.AuthenticationError, "", Trouble.DENIED, True, "set user and password to what it expects"),
    _Rule(complaints.NoPermissionError, "", Trouble.DENIED, False, "the user needs keys and channels rankd:*"),
    _Rule(complaints.ResponseError, "NOPERM", Trouble.DENIED, False, "the user needs keys and channels rankd:*"),
    _Rule(complaints.OutOfMemoryError, "", Trouble.FULL, False, "raise its maxmemory, or delete tables"),
    _Rule(complaints.ResponseError, "OOM", Trouble.FULL, False, "raise its maxmemory, or delete tables"),
    _Rule(complaints.ResponseError, "MISCONF", Trouble.FULL, False, "it cannot write to its disk; make room there"),
    _Rule(complaints.ReadOnlyError, "", Trouble.FULL, False, "this is a replica; give the address of the primary"),
    _Rule(complaints.ResponseError, "READONLY", Trouble.FULL, False, "this is a replica; give that of the primary"),
    _Rule(complaints.ResponseError, "NOREPLICAS", Trouble.FULL, False, "too few replicas are there to take writes"),
    _Rule(complaints.ResponseError, "WRONGTYPE", Trouble.BROKEN, False, _STRANGE),
    _Rule(complaints.ResponseError, "RANKD", Trouble.BROKEN, False, _STRANGE),
    _Rule(complaints.BusyLoadingError, "", Trouble.DOWN, True, "it is reading its data from disk; wait"),
    _Rule(complaints.MasterDownError, "", Trouble.DOWN, True, "its primary cannot be reached"),
    _Rule(complaints.ClusterDownError, "", Trouble.DOWN, True, "some slots have no server; look at CLUSTER INFO"),
    _Rule(complaints.ClusterCrossSlotError, "", Trouble.BROKEN, False, "it is of a cluster; write redis+cluster://"),
    _Rule(
        complaints.AskError, "", Trouble.DOWN, False, "slots are moving, or it is of a cluster: write redis+cluster://"
    ),
    _Rule(complaints.ResponseError, "BUSY", Trouble.TIMEOUT, False, "somebody's script keeps it busy"),
    _Rule(complaints.ConnectionError, "", Trouble.DOWN, True, _UNREACHED),
    _Rule(complaints.RedisError, "", Trouble.BROKEN, False, "rankd needs Redis 6 or Valkey, or newer"),
    _Rule(OSError, "", Trouble.DOWN, True, _UNREACHED),
    _Rule(RuntimeError, "", Trouble.DOWN, True, _UNREACHED),
    _Rule(Exception, "", Trouble.BROKEN, True, "it answered what is not of Redis"),
)
# TimeoutError is an OSError; RuntimeError is what uvloop raises on a connection that was closed a moment ago.
COMPLAINTS = (complaints.RedisError, OSError, RuntimeError, StoreFailure)


def failure_of(error: Exception, shown: str) -> tuple[StoreFailure, bool]:
    """The failure that an error is, and whether nothing else will work either. `shown` is the redacted URL."""
    if isinstance(error, StoreFailure):
        return error, error.trouble is Trouble.DOWN
    if isinstance(error, TimeoutError | complaints.TimeoutError):
        return StoreFailure(f"{shown} did not answer in time", Trouble.TIMEOUT), False
    text = str(error) or type(error).__name__
    if _is_of_tls(error):
        advice = "set tls_ca, tls_cert and tls_key to what it expects"
        return StoreFailure(f"{shown}: {text}; {advice}", Trouble.DENIED), True
    words = text.replace(":", " ").replace("-", " ").split()
    rule = next(rule for rule in _RULES if isinstance(error, rule.kind) and (not rule.word or rule.word in words))
    return StoreFailure(f"{shown}: {text.rstrip('.')}; {rule.advice}", rule.trouble), rule.severs


def _is_of_tls(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is of TLS."""
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return True
        error = error.__cause__ or error.__context__
    return False
