"""Serve a model over HTTP with OpenAI's chat completions.

    python -m vlm_jax.serve --model llava-folder --port 8000
    curl http://127.0.0.1:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "What is JAX?"}]}'

Paths: /v1/chat/completions (images as data URLs, several messages, streaming), /v1/models, /health. Answers equal those
of `vlm_jax.generate`, with its defaults: greedy unless the request has a temperature, seed 0. SIGTERM ends the server
when the requests being decoded are answered; waiting ones get 503.
"""

import argparse
import os
import socket
import sys
from pathlib import Path

from vlm_jax.cli import make_parser, run_main
from vlm_jax.core import reading, text
from vlm_jax.core.errors import UserError

_KEY_VARIABLE = "VLM_JAX_API_KEY"


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser("serve", __doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a Hugging Face folder, a big_vision .npz, or a run's workdir")
    add("--llm", type=Path, help="join the encoder of --model with this language model")
    add("--vision", type=Path, help="folder of the vision tower, for a checkpoint of LLaVA's own code")
    add("--compressor", help="compressor of the visual tokens")
    add("--tokens", type=int, help="number of visual tokens")
    add("--tokenizer", type=Path, help="tokenizer.json or *.model (default: next to the weights)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, else bfloat16")
    add("--name", help="the model's name in requests (default: the name of its folder)")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=8000, help="0: any free port (default: 8000)")
    add(
        "--api-key-file", type=Path, help=f"file with the key that requests must have (default: ${_KEY_VARIABLE}, none)"
    )
    add("--max-batch", type=int, default=16, help="requests decoded together (default: 16)")
    add("--window-ms", type=float, default=5.0, help="how long a request waits for others to share its batch")
    add("--queue", type=int, default=256, help="requests in progress; further ones get 429 (default: 256)")
    add("--max-tokens", type=int, default=1024, help="new tokens of a request (default: 1024)")
    add("--max-pixels", type=int, default=2**25, help="of all images of a request (default: 33554432)")
    add("--max-body", type=int, default=32 * 2**20, metavar="BYTES", help="of a request (default: 33554432)")
    args = parser.parse_args(argv)
    for name in ("max_batch", "queue", "max_tokens", "max_pixels", "max_body"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if not 0 <= args.window_ms <= 10_000:
        raise UserError(f"--window-ms: expected 0 to 10000, got {args.window_ms:g}")
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port: expected 0 to {2**16 - 1}, got {args.port}")
    return args


def main(argv: list[str]) -> None:
    args = _parse(argv)
    key = _api_key(args.api_key_file)
    try:
        from vlm_jax.inference.serving.server import run
    except ModuleNotFoundError as error:
        if error.name not in ("anyio", "starlette", "uvicorn"):
            raise
        raise UserError(f"serving needs {error.name}: pip install 'vlm_jax[serve]'") from error
    listener = _listener(args.host, args.port)
    import vlm_jax
    from vlm_jax.inference.serving.batching import Engine
    from vlm_jax.inference.serving.requests import ServingSpec

    _print(f"loading {args.model}")
    model = vlm_jax.load(
        args.model, dtype=args.dtype, llm=args.llm, vision=args.vision, compressor=args.compressor,
        tokens=args.tokens, tokenizer=args.tokenizer,
    )  # fmt: skip
    if model.tokenizer is None:
        raise UserError(f"{args.model}: has no tokenizer: name one with --tokenizer")
    engine = Engine(model, ServingSpec(
        args.max_body, args.max_pixels, args.max_tokens, args.queue, args.max_batch, args.window_ms / 1000
    ))  # fmt: skip
    engine.warm_up(lambda size, secs: _print(f"compiled for batches of {size}: {secs:.1f} s"))
    name = args.name or args.model.resolve().name
    if key is None and args.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"note: anyone who reaches {args.host} may use this server: set {_KEY_VARIABLE}", file=sys.stderr)
    run(engine, name, key, listener, _print)


def _print(line: str) -> None:
    print(text.printable(line), flush=True)


def _api_key(file: Path | None) -> str | None:
    """The key of a file or of the environment. Raises `UserError` for one that no header can hold."""
    source, key = f"${_KEY_VARIABLE}", os.environ.get(_KEY_VARIABLE)
    if file is not None:
        source, key = f"--api-key-file {file}", reading.read_text(file, 2**16).strip()
    if key is None:
        return None
    if not key.isascii() or not key.isprintable() or not key or " " in key:
        raise UserError(f"{source}: expected a key of ASCII characters without spaces, got another or none")
    return key


def _listener(host: str, port: int) -> socket.socket:
    """A bound socket. Raises `UserError` before a model is loaded."""
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except (OSError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: cannot listen there ({reason}): choose another") from error


if __name__ == "__main__":
    run_main(main)
