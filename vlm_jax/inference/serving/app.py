"""The HTTP side: routes, keys, limits of what is read, answers as JSON or as server-sent events.

app = make_app(engine, "my-model", api_key=None)
"""

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator

import anyio
from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from vlm_jax.inference.serving import replies, transport
from vlm_jax.inference.serving.answers import Completion, settled
from vlm_jax.inference.serving.batching import Engine, closing_error
from vlm_jax.inference.serving.jobs import Job, prepare
from vlm_jax.inference.serving.requests import ChatRequest, RequestError, parse


def make_app(engine: Engine, name: str, api_key: str | None = None) -> Starlette:
    """The application of a model served as `name`. It starts the engine, and closes it at its end."""
    created = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.close()
        await to_thread.run_sync(engine.join)

    async def health(request: Request) -> Response:
        return transport.error(closing_error()) if engine.is_closing else transport.json_response({"status": "ok"})

    async def models(request: Request) -> Response:
        return transport.json_response({"object": "list", "data": [replies.model(name, created)]})

    async def model(request: Request) -> Response:
        asked = request.path_params["name"]
        if asked != name:
            raise RequestError(404, f"model: expected {name!r}, got {asked[:80]!r}", "model", "model_not_found")
        return transport.json_response(replies.model(name, created))

    async def on_http_error(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"[:200]
        message = {404: f"{where}: no such path", 405: f"{where}: this method is not allowed"}.get(error.status_code)
        response = transport.error(RequestError(error.status_code, message or str(error.detail)))
        response.headers.update(error.headers or {})
        return response

    async def on_request_error(request: Request, error: RequestError) -> Response:
        return transport.error(error)

    routes = [
        Route("/health", health, methods=["GET"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name:path}", model, methods=["GET"]),
        Route("/v1/chat/completions", ChatCompletions(engine, name), methods=["POST"]),
    ]
    app = Starlette(
        routes=routes, lifespan=lifespan, middleware=[Middleware(transport.Guard, api_key=api_key)],
        exception_handlers={HTTPException: on_http_error, RequestError: on_request_error},
    )  # fmt: skip
    app.router.redirect_slashes = False
    return app


class ChatCompletions:
    """POST /v1/chat/completions, as an ASGI application: it sees when the client goes away."""

    def __init__(self, engine: Engine, name: str):
        self.engine, self.name, self.in_progress = engine, name, 0
        self.host_threads: anyio.CapacityLimiter | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.engine.is_closing:
            raise closing_error()
        if self.in_progress >= self.engine.spec.queue:
            message = f"{self.in_progress} requests are in progress, the most that this server takes: try again later"
            raise RequestError(429, message, code="queue_full")
        self.in_progress += 1
        try:
            await self._respond(scope, receive, send)
        finally:
            self.in_progress -= 1

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        engine, updates = self.engine, asyncio.Queue[Completion | RequestError]()
        loop = asyncio.get_running_loop()

        def publish(update: Completion | RequestError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop ended: nobody waits
                loop.call_soon_threadsafe(updates.put_nowait, update)

        def make_job(body: bytes) -> Job:
            request = parse(body, self.name)
            return Job(engine.model, request, prepare(engine.model, request, engine.spec), publish)

        body = await transport.read_body(scope, receive, engine.spec.max_body)
        if body is None:  # the client is gone
            return
        if self.host_threads is None:  # images are decoded there: bounds their memory
            self.host_threads = anyio.CapacityLimiter(os.cpu_count() or 1)
        job = await to_thread.run_sync(make_job, body, limiter=self.host_threads)
        engine.submit(job)
        try:
            async with transport.until_disconnect(receive):
                reply = replies.Reply(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), self.name, job.prompt)
                if job.request.stream:
                    await _stream(job.request, updates, reply, scope, receive, send)
                else:
                    response = transport.json_response(reply.whole(await _next(updates)))
                    await response(scope, receive, send)
        finally:
            job.cancel()


async def _next(updates: asyncio.Queue[Completion | RequestError]) -> Completion:
    update = await updates.get()
    if isinstance(update, RequestError):
        raise update
    return update


async def _stream(
    request: ChatRequest, updates: asyncio.Queue[Completion | RequestError], reply: replies.Reply,
    scope: Scope, receive: Receive, send: Send,
) -> None:  # fmt: skip
    """Sends the text as it is decoded. The first update decides the status."""
    answer: Completion | RequestError = await _next(updates)

    async def events() -> AsyncGenerator[bytes]:
        nonlocal answer
        sent = 0
        yield replies.event(reply.chunk({"role": "assistant", "content": ""}))
        while isinstance(answer, Completion):
            text = settled(answer, request.stop)
            if len(text) > sent:
                yield replies.event(reply.chunk({"content": text[sent:]}))
                sent = len(text)
            if answer.finish_reason is not None:
                yield replies.event(reply.chunk({}, answer.finish_reason))
                if request.include_usage:
                    yield replies.event(reply.usage_chunk(answer))
                yield replies.DONE
                return
            answer = await updates.get()
        yield replies.event(replies.error(answer))

    await transport.send_events(events(), send)
