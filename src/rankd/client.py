"""The Python client: the methods of a Ranker, over HTTP."""

from __future__ import annotations

from typing import Any, Self, TypeVar

import httpx
import msgspec
import numpy as np

from rankd import errors
from rankd.errors import InvalidRequest, RankdError, Unavailable
from rankd.serve.wire import ErrorAnswer, EventsAnswer, EventsBody, RankAnswer, encode, encode_event, encode_request
from rankd.types import Event, RankRequest, Scores

T = TypeVar("T")


class Client:
    """A connection to a rankd server. Errors of the server are raised as the same classes that a Ranker raises.

    Args:
        url: such as "http://localhost:8000".
        timeout_s: for one call, in seconds.

    Raises:
        InvalidRequest: the url is not an HTTP address.
    """

    def __init__(self, url: str, timeout_s: float = 10.0) -> None:
        advice = "give one such as http://localhost:8000"
        try:
            address = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise InvalidRequest(f"'{url}' is not the address of a server: {error}; {advice}") from error
        if address.scheme not in ("http", "https") or not address.host:
            raise InvalidRequest(f"'{url}' is not the address of a server; {advice}")
        self._http = httpx.Client(base_url=address, timeout=timeout_s)

    def rank(self, request: RankRequest) -> Scores:
        """Score the candidates of a request.

        Raises:
            RankdError: as `Ranker.rank`; Unavailable if the server cannot be reached.
        """
        answer = self._call("POST", "/v1/rank", encode_request(request), RankAnswer)
        return Scores(
            model=answer.model,
            version=answer.version,
            candidates=answer.candidates,
            tasks=answer.tasks,
            scores=np.asarray(answer.scores, np.float32),
            unknown=answer.unknown,
            unknown_user=answer.unknown_user,
            degraded=answer.degraded,
            rows=answer.rows,
            state=answer.state,
            request_id=answer.request_id,
            timings_ms=answer.timings_ms,
        )

    def append_events(self, user_id: str, events: tuple[Event, ...], model: str = "") -> tuple[int, tuple[str, ...]]:
        """Append events to a user's history: how many are stored now, and the item ids the model does not know."""
        body = encode(EventsBody(user_id, [encode_event(event) for event in events], model))
        answer = self._call("POST", "/v1/events", body, EventsAnswer)
        return list(answer.stored.values())[-1], answer.unknown

    def models(self) -> list[dict[str, Any]]:
        """What the server has: GET /v1/models."""
        return self._call("GET", "/v1/models", b"", list[dict[str, Any]])

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: str, path: str, body: bytes, kind: type[T]) -> T:
        try:
            response = self._http.request(
                method, path, content=body or None, headers={"content-type": "application/json"} if body else None
            )
        except httpx.RequestError as error:
            raise Unavailable(f"no answer from {self._http.base_url}: {error or type(error).__name__}") from error
        if response.status_code != 200:
            raise _error_of(response)
        try:
            return msgspec.json.decode(response.content, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise RankdError(f"{response.url} does not answer as rankd does: {error}") from error


def _error_of(response: httpx.Response) -> RankdError:
    try:
        detail = msgspec.json.decode(response.content, type=ErrorAnswer).error
    except (msgspec.MsgspecError, UnicodeDecodeError):
        words = " ".join(response.text.split())
        return RankdError(f"HTTP {response.status_code} from {response.url}: {words[:200]}")
    kind = getattr(errors, detail.type, RankdError)
    if kind is errors.Overloaded:
        return errors.Overloaded(detail.message, float(response.headers.get("retry-after", 1)))
    return (
        kind(detail.message) if isinstance(kind, type) and issubclass(kind, RankdError) else RankdError(detail.message)
    )
