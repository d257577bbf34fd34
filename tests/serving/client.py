"""A tiny model behind the server, and requests to it."""

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.numpy import save_file

import vlm_jax
from tests.golden import peers_answers, peers_text
from tests.golden.drawn import weights
from vlm_jax.inference.serving.requests import ServingSpec

CASES = peers_answers.read()
PICTURES = [Image.fromarray(picture) for picture in peers_answers.pictures()]
SPEC = ServingSpec(max_body=200_000, max_pixels=50_000, max_tokens=100, queue=64, max_batch=4, window_secs=0.02)
CHAT = "/v1/chat/completions"


def load(name: str, folder: Path) -> vlm_jax.Model:
    """A model of `peers_answers`, its files written to `folder`."""
    peers_text.write(CASES[name]["files"], folder)
    save_file(weights(CASES[name]["shapes"]), folder / "model.safetensors")
    return vlm_jax.load(folder)


def data_url(picture: Image.Image, file_format: str = "PNG") -> str:
    out = io.BytesIO()
    picture.save(out, file_format)
    return f"data:image/{file_format.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def message(text: str, *pictures: Image.Image, role: str = "user") -> dict[str, Any]:
    images = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
    return {"role": role, "content": [*images, {"type": "text", "text": text}]}


def body(*messages: dict[str, Any], **fields: object) -> dict[str, Any]:
    return {"messages": list(messages), "max_tokens": 20, **fields}


def answer(response: Any) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def events(response: Any) -> list[dict[str, Any]]:
    """The objects of a stream, which must end with [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, done = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert done == "[DONE]"
    return [json.loads(line) for line in lines]
