"""Messages in the content format that a chat template expects.

A message's content is a string, or a list of parts: {"type": "text", "text": "What is this?"} and {"type": "image"}.
Templates of vision-language models loop over parts, those of language models print strings, some accept both. Given the
other form, a template drops or misprints it without an error; a trial render detects the form.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vlm_jax.core.errors import UserError
from vlm_jax.data.template_process import TemplateLimit

Message = Mapping[str, Any]  # {"role": "user", "content": "What is this?"}
Part = Mapping[str, Any]
# Trial text, and the name of a field that no template reads. Digits: a template may change the case of letters.
_TEXT, _UNREAD = "71934", "80215"


class ContentFormat(NamedTuple):
    """Forms of `content` that a template renders."""

    strings: bool
    parts: bool
    images: bool  # an image part is rendered as the image token


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, each with a role, and each user message with a content."""
    if not isinstance(prompt, Sequence) or not prompt:
        return False
    return all(
        isinstance(message, Mapping)
        and "role" in message
        and (message["role"] != "user" or isinstance(message.get("content"), str | list | tuple))
        for message in prompt
    )


def detect_content_format(render: Callable[[Sequence[Message]], str], image_token: str) -> ContentFormat:
    """The content format of a template, from trial renders; strings where every trial raises.

    Raises `TemplateLimit`.
    """

    def rendered(content: str | list[Part]) -> str:
        try:
            return render([{"role": "user", "content": content}])
        except TemplateLimit:
            raise
        except UserError:
            return ""

    text, image = {"type": "text", "text": _TEXT, _UNREAD: ""}, {"type": "image", _UNREAD: ""}
    string, text_part, both_parts = rendered(_TEXT), rendered([text]), rendered([image, text])
    # Where the unread field appears too, the template printed the part as Python or JSON.
    parts = _TEXT in text_part and _UNREAD not in text_part
    images = parts and image_token in both_parts and _UNREAD not in both_parts
    return ContentFormat(_TEXT in string or not parts, parts, images)


def format_messages(
    messages: Sequence[Message], content_format: ContentFormat, image_token: str, images: int
) -> list[Message]:
    """The messages in a template's content format. Images are put in front of the first user message where no message
    has an image part or image token.

    Args:
        image_token: text of the image token ("<image>").
        images: number of images.

    Raises `UserError` for parts of other types, or where the number of image parts and tokens is not `images`.
    """
    contents = [_to_parts(message) for message in messages]
    parts = [part for content in contents for part in content or ()]
    count = sum(part.get("text", image_token).count(image_token) for part in parts)
    if images and not count:
        first = next((i for i, message in enumerate(messages) if message.get("role") == "user"), None)
        if first is None:
            raise UserError("messages: expected one of the role 'user' to hold the image, got none")
        contents[first] = [*({"type": "image"} for _ in range(images)), *(contents[first] or ())]
    elif count != images and (images or any(part["type"] == "image" for part in parts)):
        raise image_count_error(count, images)
    return [_format(*pair, content_format, image_token) for pair in zip(messages, contents, strict=True)]


def image_count_error(count: int, images: int) -> UserError:
    return UserError(f"prompt: expected {images} image placeholders, one for each image given, got {count}")


def _to_parts(message: Message) -> list[Part] | None:
    """A message's content as parts, None where it has none."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        return None
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else part
        if kind not in ("text", "image") or (kind == "text" and not isinstance(part.get("text"), str)):
            raise UserError(f"message part: expected type 'text' with its text, or type 'image', got {part!r}")
    return [{"type": "image"} if part["type"] == "image" else part for part in parts]


def _format(message: Message, parts: list[Part] | None, content_format: ContentFormat, image_token: str) -> Message:
    is_string = isinstance(message.get("content"), str) and len(parts or ()) == 1
    if parts is None or (is_string and content_format.strings):
        return message
    if not content_format.parts:
        return {**message, "content": "\n".join(part.get("text", image_token) for part in parts)}
    if content_format.images:
        return {**message, "content": [one for part in parts for one in _split_at_images(part, image_token)]}
    image = {"type": "text", "text": f"{image_token}\n"}
    return {**message, "content": [image if part["type"] == "image" else part for part in parts]}


def _split_at_images(part: Part, image_token: str) -> list[Part]:
    """A text's image tokens as image parts. The newline behind an image is left to the template that renders it."""
    if part["type"] == "image" or image_token not in part["text"]:
        return [part]
    first, *rest = part["text"].split(image_token)
    out: list[Part] = [{**part, "text": first}] if first else []
    for text in rest:
        text = text.removeprefix("\n")
        out += [{"type": "image"}, *([{**part, "text": text}] if text else [])]
    return out
