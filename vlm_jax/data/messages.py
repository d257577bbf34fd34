"""Messages in the form that a chat template reads.

A message's content is a text, or a list of parts: {"type": "text", "text": "What is this?"} and {"type": "image"}. The
templates of vision-language models read parts, those of language models texts, some both; each would drop or misprint
the other form without a word. Which it is, a trial tells.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vlm_jax.core.errors import UserError

Message = Mapping[str, Any]  # {"role": "user", "content": "What is this?"}
Part = Mapping[str, Any]
# TokenizerFiles to a template, the second where none looks: no letters, whose case it might change.
_TRIAL, _UNREAD = "71934", "80215"


class Reads(NamedTuple):
    """What a template reads."""

    texts: bool
    parts: bool
    images: bool  # a part that is an image becomes the mark


def are_messages(prompt: Any) -> bool:
    """Whether a prompt is a list of messages of which each of the user's has a content."""
    return (
        isinstance(prompt, Sequence)
        and len(prompt) > 0
        and all(
            isinstance(one, Mapping)
            and "role" in one
            and (one["role"] != "user" or isinstance(one.get("content"), str | list | tuple))
            for one in prompt
        )
    )


def reads(render: Callable[[Sequence[Message]], str], mark: str) -> Reads:
    """Tries a template. One that refuses every trial is taken for one of texts."""

    def said(content: str | list[Part]) -> str:
        try:
            return render([{"role": "user", "content": content}])
        except UserError:
            return ""

    text, image = ({"type": "text", "text": _TRIAL, _UNREAD: ""}, {"type": "image", _UNREAD: ""})
    texts, alone, both = said(_TRIAL), said([text]), said([image, text])
    # Where the unread is said too, a part stands there as Python or JSON prints it.
    parts = _TRIAL in alone and _UNREAD not in alone
    return Reads(_TRIAL in texts or not parts, parts, parts and mark in both and _UNREAD not in both)


def shaped(messages: Sequence[Message], what: Reads, mark: str, images: int) -> list[Message]:
    """The messages as the template reads them, with all images in front of the first of the user's unless they place
    them.

    Args:
        mark: the text that stands for an image.
        images: how many there are.

    Raises `UserError` for parts of other kinds, for images without a message of the user's, or places for another
    number of images than there are.
    """
    split = [_split(message) for message in messages]
    places = _places(split, mark)
    if images and not places:
        _place(messages, split, images)
    elif places != images and (images or any(part["type"] == "image" for parts in split for part in parts or ())):
        raise UserError(f"the messages have {places} places for images: expected {images}, one for each image given")
    out = []
    for message, parts in zip(messages, split, strict=True):
        plain = isinstance(message.get("content"), str) and len(parts or ()) == 1
        if parts is None or (plain and what.texts):
            out.append(message)
        elif what.parts:
            out.append({**message, "content": parts if what.images else _marked(parts, mark)})
        else:
            out.append({**message, "content": "\n".join(part.get("text", mark) for part in parts)})
    return out


def _split(message: Message) -> list[Part] | None:
    """A message's content as parts; None where it has none."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        return None
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else part
        if kind not in ("text", "image") or (kind == "text" and not isinstance(part.get("text"), str)):
            raise UserError(f"{part!r} is no part of a message: give one of the type 'text', with its text, or 'image'")
    return [{"type": "image"} if part["type"] == "image" else part for part in parts]


def _places(split: Sequence[list[Part] | None], mark: str) -> int:
    return sum(part.get("text", mark).count(mark) for parts in split for part in parts or ())


def _place(messages: Sequence[Message], split: list[list[Part] | None], images: int) -> None:
    for i, message in enumerate(messages):
        if message.get("role") == "user":
            split[i] = [*({"type": "image"} for _ in range(images)), *(split[i] or ())]
            return
    raise UserError("no message of the role 'user': there is no place for the image")


def _marked(parts: Sequence[Part], mark: str) -> list[Part]:
    """With the mark, on a line of its own, in the place of each image."""
    return [{"type": "text", "text": f"{mark}\n"} if part["type"] == "image" else part for part in parts]
