"""What Redis complains of, and which trouble that is."""

from __future__ import annotations

import ssl

import pytest
from redis import exceptions as complaints

from rankd.features.stores.feature_store import StoreFailure, Trouble
from rankd.features.stores.redis_failures import failure_of
from rankd.features.stores.redis_health import evicting_policy


@pytest.mark.parametrize(
    ("error", "trouble", "severs"),
    [
        (complaints.ConnectionError("Connection refused"), Trouble.DOWN, True),
        (ConnectionResetError("reset"), Trouble.DOWN, True),
        (complaints.BusyLoadingError("Redis is loading"), Trouble.DOWN, True),
        (complaints.ClusterDownError("Hash slot not served"), Trouble.DOWN, True),
        (complaints.MovedError("12 h:80"), Trouble.DOWN, False),
        (RuntimeError("the handler is closed"), Trouble.DOWN, True),
        (TimeoutError(), Trouble.TIMEOUT, False),
        (complaints.TimeoutError("reading"), Trouble.TIMEOUT, False),
        (complaints.ResponseError("BUSY Redis is busy running a script"), Trouble.TIMEOUT, False),
        (complaints.AuthenticationError("Authentication required."), Trouble.DENIED, True),
        (complaints.NoPermissionError("this user has no permissions"), Trouble.DENIED, False),
        (ssl.SSLCertVerificationError("self-signed certificate"), Trouble.DENIED, True),
        (complaints.OutOfMemoryError("command not allowed"), Trouble.FULL, False),
        (
            complaints.ResponseError("Error running script: @user_script:1: -OOM command not allowed"),
            Trouble.FULL,
            False,
        ),
        (complaints.ResponseError("MISCONF Redis is configured to save RDB snapshots"), Trouble.FULL, False),
        (complaints.ReadOnlyError("You can't write against a read only replica."), Trouble.FULL, False),
        (complaints.ResponseError("WRONGTYPE Operation against a key"), Trouble.BROKEN, False),
        (complaints.ResponseError("RANKD the value is not a history record"), Trouble.BROKEN, False),
        (complaints.ResponseError("unknown command"), Trouble.BROKEN, False),
        (complaints.InvalidResponse("Protocol Error"), Trouble.BROKEN, False),
        (ValueError("not a number"), Trouble.BROKEN, True),
    ],
)
def test_failures(error: Exception, trouble: Trouble, severs: bool) -> None:
    failure, found = failure_of(error, "redis://h:1")
    assert (failure.trouble, found) == (trouble, severs)
    assert str(failure).startswith("redis://h:1")


def test_a_failure_stays_what_it_is() -> None:
    failure = StoreFailure("no server holds slot 1", Trouble.DOWN)
    assert failure_of(failure, "redis://h:1") == (failure, True)


@pytest.mark.parametrize(
    ("info", "policy"),
    [
        (b"# Memory\r\nmaxmemory:100\r\nmaxmemory_policy:allkeys-lru\r\n", "allkeys-lru"),
        (b"maxmemory:100\r\nmaxmemory_policy:allkeys-random\r\n", "allkeys-random"),
        (b"maxmemory:0\r\nmaxmemory_policy:allkeys-lru\r\n", None),
        (b"maxmemory:100\r\nmaxmemory_policy:volatile-lru\r\n", None),
        (b"maxmemory:100\r\nmaxmemory_policy:noeviction\r\n", None),
        (b"", None),
        (None, None),
    ],
)
def test_policies(info: bytes | None, policy: str | None) -> None:
    assert evicting_policy(info) == policy
