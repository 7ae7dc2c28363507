"""Who is there: both sides show that they know the secret, then what is served is compared.

    client   HELLO      plan, nonce
    server   CHALLENGE  nonce, whether a secret is needed
    client   PROOF      HMAC-SHA256(secret, "client" | both nonces | plan), or nothing without a secret
    server   READY      plan, HMAC-SHA256(secret, "server" | both nonces | plan), nets, its limit, contents

Each proof is of fresh random numbers of both sides and of its own side's name, so that nothing heard once can be shown
again, to the same side or the other. What the server serves it says only to who is let in. Payloads are MessagePack.

A client that sends traces, reads which contents the tables have, or takes sums in bfloat16 says so in the number of
its HELLO, which a shard of an older rankd does not look at; one that knows of it says so in its READY, to that client
alone, for an older one would not know the word.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from typing import TypeVar

import msgspec

from rankd.errors import ShardFailure, Trouble
from rankd.shards.frame_errors import read_error
from rankd.shards.frames import Kind, frame, read_header, read_payload
from rankd.shards.shard_layout import ServedNet
from rankd.shards.streams import Stream

NONCE_BYTES = 32
HELLO_BYTES = 4096
"""Most that is taken from who is not let in yet."""
READY_BYTES = 16 << 20
TRACES = 1
"""The bit in the number of a HELLO whose client sends traces."""
CONTENTS = 2
"""The bit of one whose client reads `Ready.contents`."""
NARROW_SUMS = 4
"""The bit of one whose client may ask for sums in bfloat16."""


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From the client."""

    plan: str
    nonce: bytes


class Challenge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From the server."""

    nonce: bytes
    secret: bool


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From the client."""

    proof: bytes


class Ready(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """From the server: it may be asked. `traces`: also with a trace. `narrow_sums`: also for sums in bfloat16.
    `contents`: of each table the fingerprint of its rows (`table_format.py`), as far as known."""

    plan: str
    proof: bytes
    nets: tuple[ServedNet, ...]
    max_request_bytes: int
    traces: bool = False
    narrow_sums: bool = False
    contents: dict[str, str] = {}


T = TypeVar("T", bound=msgspec.Struct)


def let_in(stream: Stream, ready: Ready, secret: str, within_s: float) -> None:
    """The server's side; `ready` is what it says at the end, the proof still empty.

    Raises:
        OSError: the client has gone, or was not done in time.
        RankdError: it sent something else, or is not let in; the caller tells it so.
    """
    until = time.perf_counter() + within_s
    hello, said = _next(stream, Kind.HELLO, Hello, HELLO_BYTES, until, "the client")
    nonce = secrets.token_bytes(NONCE_BYTES)
    _say(stream, Kind.CHALLENGE, Challenge(nonce, bool(secret)), until)
    shown, _ = _next(stream, Kind.PROOF, Proof, HELLO_BYTES, until, "the client")
    if secret and not hmac.compare_digest(shown.proof, _proof(secret, b"client", hello, nonce)):
        raise ShardFailure(
            "this shard has a secret, and the client has none or another: give both the same", Trouble.DENIED
        )
    if hello.plan != ready.plan:
        raise ShardFailure(
            f"this shard has plan '{ready.plan}', and the client asks for plan '{hello.plan}': start shards of the "
            "client's plan, or the client with this one",
            Trouble.DENIED,
        )
    proof = _proof(secret, b"server", hello, nonce) if secret else b""
    contents = ready.contents if said & CONTENTS else {}
    traces, narrow_sums = bool(said & TRACES), bool(said & NARROW_SUMS)
    said_back = msgspec.structs.replace(ready, proof=proof, traces=traces, narrow_sums=narrow_sums, contents=contents)
    _say(stream, Kind.READY, said_back, until)


def introduce(stream: Stream, plan: str, nets: tuple[ServedNet, ...], secret: str, until: float, shown: str) -> Ready:
    """The client's side, with a shard (`shown`) that is to have this plan and these nets.

    Raises:
        OSError: it has gone, or was not done in time.
        RankdError: it sent something else, does not let us in, does not know the secret, or serves something else.
    """
    hello = Hello(plan, secrets.token_bytes(NONCE_BYTES))
    _say(stream, Kind.HELLO, hello, until, TRACES | CONTENTS | NARROW_SUMS)
    challenge, _ = _next(stream, Kind.CHALLENGE, Challenge, HELLO_BYTES, until, shown)
    _say(stream, Kind.PROOF, Proof(_proof(secret, b"client", hello, challenge.nonce) if secret else b""), until)
    ready, _ = _next(stream, Kind.READY, Ready, READY_BYTES, until, shown)
    if secret and not hmac.compare_digest(ready.proof, _proof(secret, b"server", hello, challenge.nonce)):
        raise ShardFailure(f"{shown} does not know the secret; it is another's, or has none set", Trouble.DENIED)
    if ready.plan != plan or ready.nets != nets:
        raise ShardFailure(
            f"{shown} serves {_words(ready.nets)} of plan '{ready.plan}', and plan '{plan}' here says "
            f"{_words(nets)}: start it with the same layout",
            Trouble.DENIED,
        )
    return ready


def _proof(secret: str, side: bytes, hello: Hello, nonce: bytes) -> bytes:
    pieces = (side, hello.nonce, nonce, hello.plan.encode())
    text = b"".join(len(piece).to_bytes(4, "little") + piece for piece in pieces)  # no two sets make the same text
    return hmac.new(secret.encode(), text, hashlib.sha256).digest()


def _say(stream: Stream, kind: Kind, content: msgspec.Struct, until: float, number: int = 0) -> None:
    stream.send(frame(kind, number, [memoryview(msgspec.msgpack.encode(content))]), until)


def _next(stream: Stream, kind: Kind, content: type[T], limit: int, until: float, shown: str) -> tuple[T, int]:
    """What the other side says, and the number of its frame."""
    left_s = until - time.perf_counter()
    header = read_header(stream, limit, until, left_s)
    payload = read_payload(stream, header, until - time.perf_counter())
    if header.kind is Kind.ERROR:
        raise read_error(payload.data, shown)
    if header.kind is Kind.GOODBYE:
        raise ShardFailure(f"{shown} is draining", Trouble.DOWN)
    if header.kind is not kind:
        raise ShardFailure(f"{shown} sent {header.kind.name}, expected was {kind.name}", Trouble.BROKEN)
    try:
        return msgspec.msgpack.decode(payload.data, type=content), header.number
    except msgspec.DecodeError as error:
        raise ShardFailure(f"{shown} sent a {kind.name} that cannot be read: {error}", Trouble.BROKEN) from error


def _words(nets: tuple[ServedNet, ...]) -> str:
    parts = [
        f"{served.part.table} {served.part.remainder} of {served.part.modulus} ({served.rows} x {served.dim})"
        for net in nets
        for served in net.parts
    ]
    return f"{len(parts)} parts ({', '.join(parts[:5])}{', ...' if len(parts) > 5 else ''})"
