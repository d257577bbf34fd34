"""The command itself: it prints where it listens, answers, and ends at SIGTERM without losing a request."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import vlm_jax
from tests.serving.client import CHAT, PICTURES, body, load, message
from vlm_jax import serve
from vlm_jax.core.errors import UserError


def post(url: str, request: dict[str, Any]) -> Any:
    asked = urllib.request.Request(url, json.dumps(request).encode(), {"Authorization": "Bearer sesame"})
    with urllib.request.urlopen(asked, timeout=120) as response:
        return json.loads(response.read())


def test_the_command_serves_until_sigterm(tmp_path: Path) -> None:
    model = load("llava", tmp_path / "llava")
    (expected,) = vlm_jax.generate(model, PICTURES[:1], ["read"], 20)
    (tmp_path / "key").write_text("sesame\n")
    flags = ["--model", str(tmp_path / "llava"), "--port", "0", "--max-batch", "1"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "VLM_JAX_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(
        [sys.executable, "-m", "vlm_jax.serve", *flags, "--api-key-file", str(tmp_path / "key")],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("serving "):
                    break
            assert lines[0] == f"loading {tmp_path / 'llava'}\n"
            assert lines[1].startswith("compiled for batches of 1: ")
            url = lines[-1].split()[-1].removesuffix("/v1")
            found = post(url + CHAT, body(message("read", PICTURES[0])))
            assert found["choices"][0]["message"]["content"] == expected
            assert found["model"] == "llava"
            with urllib.request.urlopen(f"{url}/health", timeout=60) as response:
                assert json.loads(response.read()) == {"status": "ok"}
            # A stream that has begun ends as it should.
            asked = urllib.request.Request(
                url + CHAT, json.dumps(body(message("read"), max_tokens=200, stream=True)).encode(),
                {"Authorization": "Bearer sesame"},
            )  # fmt: skip
            with urllib.request.urlopen(asked, timeout=120) as response:
                assert response.readline().startswith(b"data: {")
                process.send_signal(signal.SIGTERM)
                assert response.read().endswith(b"data: [DONE]\n\n")
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (0, "stopped\n", "")


def test_bad_flags_are_refused_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--model", str(tmp_path / "none")]
    (tmp_path / "empty").write_text("\n")
    for words, flags in (
        ("--port: expected 0 to 65535, got 70000", ["--port", "70000"]),
        ("--queue: expected at least 1, got 0", ["--queue", "0"]),
        ("--window-ms: expected", ["--window-ms", "nan"]),
        ("cannot listen there", ["--host", "256.0.0.1"]),
        ("cannot be read", ["--api-key-file", str(tmp_path / "missing")]),
        ("expected a key of ASCII", ["--api-key-file", str(tmp_path / "empty")]),
    ):
        with pytest.raises(UserError, match=words):
            serve.main([*given, *flags])
    monkeypatch.setenv("VLM_JAX_API_KEY", "two words")
    with pytest.raises(UserError, match=r"\$VLM_JAX_API_KEY: expected a key"):
        serve.main(given)


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    listener = serve._listener("127.0.0.1", 0)
    listener.listen()
    with listener, pytest.raises(UserError, match="cannot listen there"):
        serve.main(["--model", str(tmp_path), "--port", str(listener.getsockname()[1])])
