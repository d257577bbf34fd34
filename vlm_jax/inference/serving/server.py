"""The server process: uvicorn, and what SIGTERM does."""

import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from vlm_jax.inference.serving.app import make_app
from vlm_jax.inference.serving.batching import Engine

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_KEEP_ALIVE_SECS = 75
_GRACE_SECS = 300  # for the running requests at the end; a client that does not read must not hold the process


class _Server(uvicorn.Server):
    """At a signal the waiting requests fail, and uvicorn waits for the running ones; at a second one it does not."""

    def __init__(self, config: uvicorn.Config, engine: Engine, on_started: Callable[[], None]):
        super().__init__(config)
        self.engine, self.on_started = engine, on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's, does not raise the signal again at the end: the exit code is 0."""
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self.engine.close()


def run(
    engine: Engine, name: str, api_key: str | None, listener: socket.socket, on_line: Callable[[str], None]
) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    app = make_app(engine, name, api_key)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="on", ws="none", timeout_keep_alive=_KEEP_ALIVE_SECS,
        timeout_graceful_shutdown=_GRACE_SECS,
    )  # fmt: skip
    _Server(config, engine, lambda: on_line(f"serving {name} at {url}")).run(sockets=[listener])
    on_line("stopped")
