"""The server answers as `generate` does, whoever shares the batch."""

import asyncio
import base64
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import pytest
from PIL import Image
from starlette.testclient import TestClient

import vlm_jax
from tests.golden import peers_answers
from tests.serving.client import CHAT, PICTURES, SPEC, answer, body, data_url, events, load, message
from vlm_jax.core.errors import UserError
from vlm_jax.inference import decoding
from vlm_jax.inference.serving.app import make_app
from vlm_jax.inference.serving.batching import Engine, sizes
from vlm_jax.inference.serving.requests import ServingSpec

QUESTIONS = peers_answers.QUESTIONS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> vlm_jax.Model:
    return load("llava", tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def client(model: vlm_jax.Model) -> Iterator[TestClient]:
    with TestClient(make_app(Engine(model, SPEC), "tiny")) as client:
        yield client


def test_answers_in_shared_batches_are_those_of_generate(model: vlm_jax.Model, client: TestClient) -> None:
    """Prompts, images, lengths and sampling all differ; 36 requests from 12 clients at once."""
    cases = []
    for i in range(36):
        pictures = PICTURES[: (0, 1, 1, 2)[i % 4]]
        sampling = [{}, {"temperature": 1.0, "seed": i}, {"temperature": 1.5, "top_p": 0.8, "seed": 7}][i % 3]
        cases.append((QUESTIONS[i % 2], pictures, {"max_tokens": 5 + i % 20, **sampling}))
    expected = [
        vlm_jax.generate(model, [pictures] if pictures else None, [question], sampling["max_tokens"],
                         sampling.get("temperature", 0.0), sampling.get("top_p", 1.0), sampling.get("seed", 0))[0]
        for question, pictures, sampling in cases
    ]  # fmt: skip
    assert len(set(expected)) > 20
    with ThreadPoolExecutor(12) as threads:
        asked = [body(message(question, *pictures), **sampling) for question, pictures, sampling in cases]
        found = list(threads.map(lambda each: answer(client.post(CHAT, json=each)), asked))
    assert found == expected


def test_requests_that_arrive_together_share_a_batch(model: vlm_jax.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are few; rows that would leave more than half of a batch empty wait for the next one."""
    seen: list[int] = []
    start = decoding.start
    monkeypatch.setattr(
        decoding, "start", lambda m, inputs, *rest: seen.append(len(inputs.tokens)) or start(m, inputs, *rest)
    )
    spec = ServingSpec(max_batch=4, window_secs=2.0)
    with TestClient(make_app(Engine(model, spec), "tiny")) as client, ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: answer(client.post(CHAT, json=body(message("read"), max_tokens=3))), range(8)))
    assert seen == [4, 4]
    assert sizes(16) == [1, 4, 16]
    assert sizes(6) == [1, 4, 6]
    assert sizes(1) == [1]


def test_a_conversation_is_rendered_by_the_template(model: vlm_jax.Model, client: TestClient) -> None:
    turns = [("system", "Be brief."), ("user", "read"), ("assistant", "yes"), ("user", "What is in this picture?")]
    plain = [{"role": role, "content": text} for role, text in turns]
    (expected,) = vlm_jax.generate(model, None, [plain], 20)
    assert answer(client.post(CHAT, json=body(*plain))) == expected
    plain[0]["role"] = "developer"  # OpenAI's newer name
    assert answer(client.post(CHAT, json=body(*plain))) == expected
    with_image = [{**turn, "content": [{"type": "image"}, {"type": "text", "text": turn["content"]}]}
                  if i == 3 else turn for i, turn in enumerate(plain[1:], 1)]  # fmt: skip
    (expected,) = vlm_jax.generate(model, [PICTURES[0]], [with_image], 20)
    asked = [*plain[1:3], message(turns[3][1], PICTURES[0])]
    assert answer(client.post(CHAT, json=body(*asked))) == expected


def test_a_model_without_a_template_takes_one_message(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = load("paligemma", tmp_path_factory.mktemp("models") / "paligemma")
    (expected,) = vlm_jax.generate(model, PICTURES[:1], [QUESTIONS[0]], 20)
    with TestClient(make_app(Engine(model, SPEC), "tiny")) as client:
        assert answer(client.post(CHAT, json=body(message(QUESTIONS[0], PICTURES[0])))) == expected
        refused = client.post(CHAT, json=body(message("Be brief.", role="system"), message("read", PICTURES[0])))
    assert refused.status_code == 400
    assert "one message of role 'user'" in refused.json()["error"]["message"]


def test_the_object_counts_tokens_and_says_why_it_ended(model: vlm_jax.Model, client: TestClient) -> None:
    reply = client.post(CHAT, json=body(message("read", PICTURES[0]), model="tiny", unknown={"x": 1}, user="me")).json()
    assert reply["object"] == "chat.completion"
    assert reply["model"] == "tiny"
    assert reply["id"].startswith("chatcmpl-")
    (choice,) = reply["choices"]
    assert choice["message"]["role"] == "assistant"
    tokens = len(model.tokenizer.encode(choice["message"]["content"])) - 1  # without bos
    assert choice["finish_reason"] == ("length" if reply["usage"]["completion_tokens"] == 20 else "stop")
    assert 0 < tokens <= reply["usage"]["completion_tokens"] <= 20
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    without = client.post(CHAT, json=body(message("read"))).json()["usage"]["prompt_tokens"]
    assert usage["prompt_tokens"] >= without + model.visual_tokens


def test_max_completion_tokens_goes_before_max_tokens(client: TestClient) -> None:
    reply = client.post(CHAT, json=body(message("read"), max_completion_tokens=3)).json()
    assert reply["usage"]["completion_tokens"] == 3
    assert reply["choices"][0]["finish_reason"] == "length"


def test_a_stop_text_ends_the_answer_before_it(model: vlm_jax.Model, client: TestClient) -> None:
    (whole,) = vlm_jax.generate(model, None, ["read"], 40)
    stop = whole[len(whole) // 2 :][:3]
    for given in (stop, ["nowhere to be found", stop]):
        for stream in (False, True):
            response = client.post(CHAT, json=body(message("read"), max_tokens=40, stop=given, stream=stream))
            if stream:
                pieces = events(response)
                text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
                reason = pieces[-1]["choices"][0]["finish_reason"]
            else:
                text, reason = answer(response), response.json()["choices"][0]["finish_reason"]
            assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_a_stream_is_the_answer_in_pieces(client: TestClient) -> None:
    asked = body(message(QUESTIONS[0], PICTURES[0]), max_tokens=60)
    expected = client.post(CHAT, json=asked).json()
    pieces = events(client.post(CHAT, json={**asked, "stream": True, "stream_options": {"include_usage": True}}))
    *pieces, last = pieces
    assert last["choices"] == []
    assert last["usage"] == expected["usage"]
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    assert len({piece["id"] for piece in pieces}) == 1
    assert pieces[0]["choices"][0]["delta"]["role"] == "assistant"
    deltas = [piece["choices"][0]["delta"].get("content", "") for piece in pieces]
    assert "".join(deltas) == expected["choices"][0]["message"]["content"]
    assert len(deltas) > 3
    assert [piece["choices"][0]["finish_reason"] for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1]["choices"][0]["finish_reason"] == expected["choices"][0]["finish_reason"]


def test_top_p_of_zero_is_greedy(client: TestClient) -> None:
    greedy, cold, warm = (
        answer(client.post(CHAT, json=body(message("read"), **fields)))
        for fields in ({}, {"temperature": 1.8, "top_p": 0}, {"temperature": 1.8, "top_p": 1})
    )
    assert greedy == cold != warm


def test_images_of_several_formats(model: vlm_jax.Model, client: TestClient) -> None:
    """By content; the header's type, its letters and line breaks do not matter."""
    (expected,) = vlm_jax.generate(model, PICTURES[:1], ["read"], 20)
    for file_format in ("PNG", "BMP", "TIFF"):
        url = data_url(PICTURES[0], file_format)
        head, _, data = url.partition(",")
        for each in (url, f"data:;BASE64,{data}", f"{head},{data[:40]}\n{data[40:]}"):
            image = {"type": "image_url", "image_url": {"url": each, "detail": "low"}}
            content = [image, {"type": "text", "text": "read"}]
            assert answer(client.post(CHAT, json=body({"role": "user", "content": content}))) == expected


def test_models_and_health(client: TestClient) -> None:
    (listed,) = client.get("/v1/models").json()["data"]
    assert (listed["id"], listed["object"]) == ("tiny", "model")
    assert client.get("/v1/models/tiny").json() == listed
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}


def test_a_key_is_asked_for_under_v1(model: vlm_jax.Model) -> None:
    with TestClient(make_app(Engine(model, SPEC), "tiny", "sesame")) as client:
        assert client.get("/health").status_code == 200
        for key in (None, "Bearer other", "Bearer", "Basic sesame", "sesame", "Bearer sesame2", "Bearer \xff"):
            headers = [] if key is None else [(b"authorization", key.encode("latin-1"))]
            for response in (client.get("/v1/models", headers=headers),
                             client.post(CHAT, headers=headers, json=body(message("read")))):  # fmt: skip
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        headers = {"Authorization": "bearer sesame"}
        assert answer(client.post(CHAT, headers=headers, json=body(message("read"))))


class Gate:
    """Holds batches back before they are decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.reached, self.opened, start = threading.Event(), threading.Event(), decoding.start

        def held(*args: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(60)
            return start(*args)

        monkeypatch.setattr(decoding, "start", held)


def test_a_full_queue_refuses_and_closing_fails_waiting_requests(
    model: vlm_jax.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The running request is answered."""
    (expected,) = vlm_jax.generate(model, None, ["read"], 20)
    gate = Gate(monkeypatch)
    engine = Engine(model, ServingSpec(queue=2, max_batch=1))
    with TestClient(make_app(engine, "tiny")) as client, ThreadPoolExecutor(2) as threads:
        running = threads.submit(client.post, CHAT, json=body(message("read")))
        assert gate.reached.wait(60)
        waiting = threads.submit(client.post, CHAT, json=body(message("read")))
        while not engine.waiting:
            assert not waiting.done()
            time.sleep(0.005)
        refused = client.post(CHAT, json=body(message("read")))
        assert refused.status_code == 429
        assert "retry-after" in refused.headers
        engine.close()
        assert waiting.result().status_code == 503
        assert client.post(CHAT, json=body(message("read"))).status_code == 503
        assert client.get("/health").status_code == 503
        gate.opened.set()
        assert answer(running.result()) == expected


def test_a_client_that_goes_away_ends_its_decoding(model: vlm_jax.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the next look at its tokens; plain and streamed."""
    steps: list[int] = []
    advance, gone = decoding.advance, threading.Event()

    def slow(*args: Any) -> Any:
        steps.append(args[-1])
        assert gone.wait(60)
        return advance(*args)

    monkeypatch.setattr(decoding, "advance", slow)

    async def post(app: Any, stream: bool) -> list[Any]:
        sent: list[Any] = []
        messages = [
            {"type": "http.request", "body": json.dumps(body(message("read"), max_tokens=100, stream=stream)).encode()}
        ]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            while not steps:
                await asyncio.sleep(0.005)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "query_string": b"", "root_path": "",
                 "scheme": "http", "server": ("testserver", 80), "http_version": "1.1"}  # fmt: skip
        await app(scope, receive, send)
        return sent

    for stream in (False, True):
        steps.clear(), gone.clear()
        engine = Engine(model, SPEC)
        app = make_app(engine, "tiny")
        engine.start()
        sent = asyncio.run(post(app, stream))
        gone.set()
        engine.close()
        engine.join()
        assert len(steps) <= 2  # of 13
        assert [each["type"] for each in sent].count("http.response.start") <= int(
            stream
        )  # it may go before a token comes


def test_an_error_in_a_batch_is_answered_and_the_server_goes_on(
    model: vlm_jax.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What does not fit into memory together is decoded apart."""
    (expected,) = vlm_jax.generate(model, None, ["read"], 20)
    start, problem = decoding.start, [RuntimeError("a bug")]

    def broken(*args: Any) -> Any:
        if problem:
            raise problem.pop()
        if len(args[1].tokens) > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return start(*args)

    monkeypatch.setattr(decoding, "start", broken)
    spec = ServingSpec(max_batch=4, window_secs=2.0)
    with TestClient(make_app(Engine(model, spec), "tiny")) as client, ThreadPoolExecutor(4) as threads:
        failed = client.post(CHAT, json=body(message("read")))
        assert failed.status_code == 500
        assert "a bug" not in failed.text
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1
        assert "RuntimeError" in err
        found = list(threads.map(lambda i: answer(client.post(CHAT, json=body(message("read")))), range(4)))
        assert found == [expected] * 4
        problem.append(UserError("hidden states are not finite"))
        assert client.post(CHAT, json=body(message("read"), stream=True)).status_code == 500


def test_pixels_are_counted_before_an_image_is_decoded(client: TestClient) -> None:
    """The file of a bomb is small."""
    bomb = Image.new("1", (9000, 9000))
    assert len(data_url(bomb)) < 50_000
    refused = client.post(CHAT, json=body(message("read", bomb)))
    assert refused.status_code == 413
    assert "81,000,000" in refused.json()["error"]["message"]
    assert base64.b64decode(data_url(bomb).partition(",")[2])[:4] == b"\x89PNG"
