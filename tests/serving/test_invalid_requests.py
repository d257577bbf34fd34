"""Two hundred invalid requests: each gets a 4xx in OpenAI's error format, and the server goes on."""

import base64
import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from tests.serving.client import CHAT, PICTURES, SPEC, answer, body, data_url, load, message
from vlm_jax.inference.serving.app import make_app
from vlm_jax.inference.serving.batching import Engine

TEXT = {"type": "text", "text": "read"}
PNG = data_url(PICTURES[0])
TRUNCATED = "data:image/png;base64," + base64.b64encode(base64.b64decode(PNG.partition(",")[2])[:90]).decode()


def with_fields() -> Iterator[dict[str, Any]]:
    """A valid request with one field that is not."""
    values: dict[str, list[Any]] = {
        "model": ["other", "", 3, [], {}, "x" * 10_000],
        "messages": [None, [], {}, "read", 3, [None], [[]], ["read"], [{}], [{"role": "user"}], [{"content": "read"}]],
        "max_tokens": [0, -1, 101, 10**30, 2.5, "5", True, [], {}],
        "max_completion_tokens": [0, -1, 101, 1e9, "5", False, [1]],
        "temperature": [-0.1, 2.1, 1e400, "1", True, [], {}],
        "top_p": [-0.1, 1.1, "1", False, [0.5]],
        "seed": [-1, 2**32, 2**70, 1.5, "1", True],
        "stop": ["", [""], ["a"] * 5, 3, [3], [None], {}, True, [["a"]]],
        "n": [0, 2, -1, "1", True, 1.5],
        "stream": ["true", 1, 0, [], {}],
        "stream_options": [3, [], "x", {"include_usage": 1}, {"include_usage": True}],
        "tools": [[{"type": "function"}], {}, "x"],
        "functions": [[{"name": "f"}]],
        "logprobs": [True, 1],
        "top_logprobs": [2],
        "logit_bias": [{"5": 100}, []],
        "presence_penalty": [0.5, "0", True],
        "frequency_penalty": [-1],
        "response_format": [{"type": "json_object"}, "json", {"type": "json_schema", "json_schema": {}}],
        "modalities": [["text", "audio"]],
        "audio": [{"voice": "x"}],
    }
    for name, some in values.items():
        for value in some:
            request = {**body(message("read"), stream=name == "stream_options" and value != {"include_usage": True})}
            yield {**request, name: value}


def with_messages() -> Iterator[dict[str, Any]]:
    for role in (None, 3, "", "User", "tool", "function", ["user"], {}):
        yield body({"role": role, "content": "read"})
    for content in (None, 3, {}, [], [None], ["read"], [3], [[]], [{}], "\ud800", "x" * 5000, "<image>"):
        yield body({"role": "user", "content": content})
    urls = [
        "", "x", "http://127.0.0.1/a.png", "https://example.com/a.png", "file:///etc/passwd", "/etc/passwd", "data:",
        "data:image/png,abc", "data:image/png;base64", "data:image/png;base64,", "data:image/png;base64,@@@",
        "data:image/png;base64,AAA", "data:image/png;base64,AAAA", "data:image/png;base64,ÄÖ", TRUNCATED,
        "data:text/html;base64,PGI+aGk8L2I+", PNG[:-30], "DATA:image/png;base32,MFRGG===",
    ]  # fmt: skip
    for url in urls:
        yield body({"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, TEXT]})
    parts = [
        {"type": "text"}, {"type": "text", "text": 3}, {"type": "text", "text": None}, {"type": "image"},
        {"type": "image_url"}, {"type": "image_url", "image_url": None}, {"type": "image_url", "image_url": {}},
        {"type": "image_url", "image_url": {"url": 3}}, {"type": "image_url", "image_url": [PNG]},
        {"type": "input_audio", "input_audio": {}}, {"type": "video_url"}, {"type": 3}, {"type": None}, {"type": []},
        {"text": "read"},
    ]  # fmt: skip
    for part in parts:
        yield body({"role": "user", "content": [TEXT, part]})
    yield body(message("read", PICTURES[0], role="assistant"), message("read"))
    yield body(message("Be brief.", PICTURES[0], role="system"), message("read"))
    yield body(message("Be brief.", role="system"))
    yield body(message("read", role="assistant"))
    yield body(message("<image>\nread", PICTURES[0]))  # two placeholders for one image
    yield body(message("read", *[PICTURES[0]] * 30))  # longer than the context
    yield body(message("read", Image.new("RGB", (300, 300))))  # too many pixels
    yield body(message("read", *[Image.new("RGB", (150, 150))] * 3))
    yield body({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, message("read"))
    yield body({"role": "user", "content": "read", "function_call": {"name": "f"}})


def raw() -> Iterator[bytes]:
    valid = json.dumps(body(message("read"))).encode()
    yield from (
        b"",
        b" ",
        b"{",
        b"}",
        b"[]",
        b"null",
        b"true",
        b"3",
        b'"read"',
        b"{}",
        b"\xff\xfe",
        b"\x00",
        valid[:-1],
    )
    yield from (valid + b"x", b"\xef\xbb\xbf" + valid, valid.decode().encode("utf-16"), b"messages=read", b"<xml/>")
    yield from (
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"messages": ' + b"[" * 90_000,
        b'{"max_tokens": ' + b"9" * 9000 + b"}",
    )
    for constant in (b"NaN", b"Infinity", b"-Infinity", b"1e999"):
        yield valid[:-1] + b', "temperature": ' + constant + b"}"
    yield valid[:-1] + b', "user": "' + b"x" * 300_000 + b'"}'  # too long
    yield b"\x80" * 100
    for i in range(3, len(valid) - 3, 5):
        yield valid[:i]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    model = load("llava", tmp_path_factory.mktemp("models") / "llava")
    with TestClient(make_app(Engine(model, SPEC), "tiny")) as client:
        yield client


def check(response: Any, request: object) -> None:
    assert 400 <= response.status_code < 500, (request, response.text)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert 5 < len(error["message"]) < 600, request
    assert "Traceback" not in error["message"]
    assert "\n" not in error["message"]


def test_invalid_requests_get_a_message(client: TestClient, capsys: pytest.CaptureFixture[str]) -> None:
    count = 0
    for request in itertools.chain(with_fields(), with_messages()):
        check(client.post(CHAT, content=json.dumps(request)), request)
        count += 1
    for request in raw():
        check(client.post(CHAT, content=request), request)
        count += 1
    assert count > 200
    assert capsys.readouterr().err == ""
    assert answer(client.post(CHAT, json=body(message("read", PICTURES[0]))))


def test_the_status_says_what_is_wrong(client: TestClient) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    for request, status, words in (
        (body(message("read"), model="other"), 404, "expected 'tiny', got 'other'"),
        (body(message("read"), n=2), 400, "n: expected 1 or null, got 2"),
        (body({"role": "user", "content": [image]}), 400, "fetches no URLs"),
        (body(message("read"), max_tokens=101), 400, "max_tokens: expected at most 100, got 101"),
        (body(message("x" * 400)), 400, "context of 256"),
        (body(message("read", Image.new("RGB", (300, 300)))), 413, "50,000 pixels in all, got 90,000"),
        (body(message("x" * 300_000)), 413, "expected at most 200,000 bytes"),
        (body(message("read"), temperature=3), 400, "temperature: expected a number from 0 to 2, got 3"),
    ):
        response = client.post(CHAT, json=request)
        assert response.status_code == status
        assert words in response.json()["error"]["message"]
    chunks = (b"x" * 50_000 for _ in range(6))
    assert client.post(CHAT, content=chunks).status_code == 413  # without a length


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404), ("POST", "/v1/completions", 404), ("POST", f"{CHAT}/", 404), ("GET", "/v1/../etc", 404),
        ("GET", CHAT, 405), ("PUT", CHAT, 405), ("DELETE", "/v1/models", 405), ("POST", "/health", 405),
        ("POST", "/v1/models/tiny", 405),
    ],
)  # fmt: skip
def test_unknown_paths_and_methods(client: TestClient, method: str, path: str, status: int) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["message"]
    assert (status == 405) == ("allow" in response.headers)
