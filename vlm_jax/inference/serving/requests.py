"""Chat completion requests: the JSON of a body, checked and converted to the arguments of `generate`.

The fields are those of https://platform.openai.com/docs/api-reference/chat/create. Unknown ones are ignored. Those that
ask for what this server does not do (n=2, tools, logprobs, ...) are errors: the answer would not be what was asked for.
"""

import base64
import binascii
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlm_jax.core import reading
from vlm_jax.core.errors import UserError

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MAX_STOPS = 4
# Fields that change the answer, and the values under which they do not.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
}


class RequestError(Exception):
    """An answer with an HTTP status other than 200, in OpenAI's error format."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, " ".join(message.split()), param, code


@dataclass(frozen=True)
class ServingSpec:
    """Limits of a server."""

    max_body: int = 32 * 2**20  # bytes
    max_pixels: int = 2**25  # of all images of a request
    max_tokens: int = 1024  # new tokens of a request
    queue: int = 256  # requests in progress
    max_batch: int = 16
    window_secs: float = 0.005  # how long a request waits for others to share its batch


class ChatRequest(NamedTuple):
    """A valid request."""

    messages: list[dict[str, Any]]  # roles system, user, assistant; content a string or parts of type text and image
    images: list[bytes]  # encoded files, in order of their parts
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool  # in a stream


def parse(body: bytes, model_name: str) -> ChatRequest:
    """The request in a body. Raises `RequestError` (400; 404 for another model)."""
    fields = {name: value for name, value in _json_object(body).items() if value is not None}
    name = fields.get("model", model_name)
    if not isinstance(name, str):
        raise _expected("model", "a string", name)
    if name != model_name:
        raise RequestError(404, f"model: expected {model_name!r}, got {name[:80]!r}", "model", "model_not_found")
    for field, neutral in _UNSUPPORTED.items():
        if field in fields and not any(type(fields[field]) is type(n) and fields[field] == n for n in neutral):
            only = f"expected {json.dumps(neutral[0])} or null" if neutral else "expected null"
            raise _error(f"{field}: {only}, got {_shown(fields[field])} (not supported)", field)
    messages, images = _messages(fields.get("messages"))
    limits = {field: _integer(fields, field, 1) for field in ("max_completion_tokens", "max_tokens")}
    temperature, top_p = _number(fields, "temperature", 0.0, 2.0, 0.0), _number(fields, "top_p", 0.0, 1.0, 1.0)
    if top_p == 0:
        temperature, top_p = 0.0, 1.0
    options = fields.get("stream_options", {})
    if not isinstance(options, dict) or not isinstance(options.get("include_usage") or False, bool):
        raise _expected("stream_options", "an object with include_usage true or false", options)
    stream = _boolean(fields, "stream")
    if options and not stream:
        raise _error("stream_options: expected stream=true with it", "stream_options")
    return ChatRequest(
        messages, images, limits["max_completion_tokens"] or limits["max_tokens"], temperature, top_p,
        _integer(fields, "seed", 0, 2**32 - 1) or 0, _stop(fields.get("stop")), stream,
        bool(options.get("include_usage")),
    )  # fmt: skip


def prompt_of(request: ChatRequest, has_template: bool) -> str | list[dict[str, Any]]:
    """The prompt for `generate`: messages for a model with a chat template, else the text of the only message. Raises
    `RequestError`.
    """
    if has_template:
        return request.messages
    if [message["role"] for message in request.messages] != ["user"]:
        raise _error("messages: expected one message of role 'user': this model has no chat template", "messages")
    content = request.messages[0]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return "\n".join(part["text"] for part in parts if part["type"] == "text")


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        value = reading.parse_json(body.decode(), "body")
    except UnicodeDecodeError:
        raise _error("body: expected JSON in UTF-8") from None
    except UserError as error:
        raise _error(str(error)) from None
    if not isinstance(value, dict):
        raise _expected("body", "a JSON object", value)
    return value


def _messages(value: Any) -> tuple[list[dict[str, Any]], list[bytes]]:
    if not isinstance(value, list) or not value:
        raise _expected("messages", "a list of at least one message", value)
    messages, images = [], []
    for i, message in enumerate(value):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise _expected(where, "an object with role and content", message)
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in _ROLES:
            raise _expected(f"{where}.role", f"one of {', '.join(_ROLES)}", role)
        if message.get("tool_calls") or message.get("function_call"):
            raise _error(f"{where}: expected no tool calls (not supported)", where)
        if isinstance(content, list) and content:
            content = [_part(part, f"{where}.content[{j}]", images.append) for j, part in enumerate(content)]
            if role != "user" and any(part["type"] == "image" for part in content):
                raise _error(f"{where}: expected images in messages of role 'user' only, got one of {role!r}", where)
        elif not isinstance(content, str):
            raise _expected(f"{where}.content", "a string or a list of at least one part", content)
        messages.append({"role": _ROLES[role], "content": content})
    if not any(message["role"] == "user" for message in messages):
        raise _error("messages: expected one of role 'user', got none", "messages")
    return messages, images


def _part(part: Any, where: str, on_image: Callable[[bytes], None]) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind != "image_url":
        raise _expected(where, "a part of type text (with its text) or image_url", part)
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str):
        raise _expected(f"{where}.image_url", 'an object {"url": "data:image/png;base64,..."}', image)
    on_image(_data(url, f"{where}.image_url"))
    return {"type": "image"}


def _data(url: str, where: str) -> bytes:
    header, _, text = url.partition(",")
    if not (header[:5].lower() == "data:" and header[-7:].lower() == ";base64"):
        shown = _shown(url)
        raise _error(f"{where}: expected data:image/png;base64,..., got {shown} (this server fetches no URLs)", where)
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _error(f"{where}: expected base64 ({error})", where) from None
    if not data:
        raise _error(f"{where}: expected an image, got no bytes", where)
    return data


def _number(fields: Mapping[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise _expected(name, f"a number from {low:g} to {high:g}", value)
    return float(value)


def _integer(fields: Mapping[str, Any], name: str, low: int, high: int | None = None) -> int | None:
    value = fields.get(name)
    if value is None or (type(value) is int and low <= value and (high is None or value <= high)):
        return value
    raise _expected(name, f"an integer from {low}" + ("" if high is None else f" to {high}"), value)


def _boolean(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise _expected(name, "true or false", value)
    return value


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > _MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise _expected("stop", f"a string or a list of at most {_MAX_STOPS} strings, none of them empty", value)
    return tuple(stops)


def _expected(name: str, expected: str, value: Any) -> RequestError:
    return _error(f"{name}: expected {expected}, got {_shown(value)}", name)


def _error(message: str, param: str | None = None) -> RequestError:
    return RequestError(400, message, param)


def _shown(value: Any) -> str:
    """A value in a message: the size of a list or an object, else at most 80 ASCII characters."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return "nothing" if value is None else ascii(value)[:80]
