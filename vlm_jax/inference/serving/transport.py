"""What every path needs of HTTP: errors as JSON, the API key, bodies of limited size, clients that go away."""

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import anyio
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlm_jax.inference.serving import replies
from vlm_jax.inference.serving.batching import log_bug
from vlm_jax.inference.serving.requests import RequestError

_BODY_SECS = 60.0  # to receive a body
_DISCARDED = 2**28  # bytes of a refused body that are read, so that its client gets to read the error
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """ASCII: a message may quote what is not valid UTF-8."""
    return Response(json.dumps(value), status, headers, "application/json")


def error(error: RequestError) -> Response:
    return json_response(replies.error(error), error.status, _HEADERS.get(error.status))


class Guard:
    """Checks the key of paths under /v1, answers exceptions with 500, and lets clients finish sending a body that was
    refused: closing the connection before would lose the answer.
    """

    def __init__(self, app: ASGIApp, api_key: str | None):
        self.app, self.api_key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_read = has_started = False

        async def tracked_receive() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = is_read or not message.get("more_body", False)
            return message

        async def late_send(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                if not is_read and "expect" not in Headers(scope=scope):
                    await _discard(tracked_receive, lambda: is_read)
            await send(message)

        try:
            if scope["path"].startswith("/v1") and not self._has_key(scope):
                wrong = RequestError(401, "expected the header Authorization: Bearer API_KEY", code="invalid_api_key")
                await error(wrong)(scope, tracked_receive, late_send)
            else:
                await self.app(scope, tracked_receive, late_send)
        except Exception as exception:  # a bug: the client gets an answer, the log a line
            log_bug(f"{scope['method']} {scope['path'][:80]!a}", exception)
            if not has_started:
                await error(RequestError(500, "internal error"))(scope, tracked_receive, late_send)

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        expected = (self.api_key or "").encode()
        return not self.api_key or (
            scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1", "replace"), expected)
        )


async def _discard(receive: Receive, is_read: Any) -> None:
    size = 0
    with anyio.move_on_after(_BODY_SECS):
        while not is_read() and size <= _DISCARDED:
            size += len((await receive()).get("body", b""))


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """The body; None if the client is gone. Raises `RequestError` (408, 413)."""
    too_large = RequestError(413, f"body: expected at most {limit:,} bytes, got more (scale the images down)")
    length = Headers(scope=scope).get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise too_large
    parts, size = [], 0
    with anyio.move_on_after(_BODY_SECS):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            size += len(message.get("body", b""))
            if size > limit:
                raise too_large
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                return b"".join(parts)
    raise RequestError(408, f"body: expected it within {_BODY_SECS:g} s")


@contextlib.asynccontextmanager
async def until_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Runs its block until the client of a request whose body is read goes away."""
    task = asyncio.current_task()
    assert task is not None
    is_gone = False

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not is_gone:
            raise
        task.uncancel()
    finally:
        watcher.cancel()


async def send_events(events: AsyncGenerator[bytes], send: Send) -> None:
    """Sends a stream of server-sent events."""
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async with contextlib.aclosing(events):
        async for event in events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
