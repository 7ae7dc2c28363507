"""Request bodies: read with a limit, of a content type that is known."""

from __future__ import annotations

from starlette.requests import Request

from rankd.errors import PayloadTooLarge, UnsupportedMedia


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The whole body.

    Raises:
        PayloadTooLarge: it is, or says it is, over the limit; nothing beyond the limit is kept in memory.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit_bytes:
        raise _too_large(f"{declared} bytes", limit_bytes)
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit_bytes:
            raise _too_large("more", limit_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


def check_json(request: Request) -> None:
    """Accept application/json, and bodies without a content type.

    Raises:
        UnsupportedMedia: any other content type.
    """
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedMedia(f"content type '{kind}' is not read here; send application/json")


def _too_large(given: str, limit_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body has {given}; at most {limit_bytes} bytes are read: send fewer candidates at once")
