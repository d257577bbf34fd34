"""Conversations as data sets write them -> `Turn`s in the canonical form of `Example`.

Three rules say where images stand:

    mark_front_of_turn   LLaVA-1.5 (`preprocess_multimodal`): in each turn with a placeholder, one at its front
    mark_in_place        LLaVA-NeXT, lists of images: a single placeholder moves to the front of its turn, others stay
    mark_first_turn      data without placeholders (the_cauldron, big_vision): all images before the first user turn
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vlm_jax.data.examples import IMAGE_MARKER, BadItem, Turn

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_KEYS = (("from", "value"), ("role", "content"))


def read_messages(id: str, messages: Any) -> tuple[Turn, ...]:
    """[{"from": "human", "value": ...}] or [{"role": "user", "content": ...}] as turns. An assistant turn before
    the first user turn is dropped, as LLaVA does. Raises `BadItem`.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise BadItem("malformed", id, f"expected a list of messages, got {_shown(messages)}")
    turns = [_turn(id, number, message) for number, message in enumerate(messages)]
    systems = 1 if turns[0].role == "system" else 0
    if len(turns) > systems and turns[systems].role == "assistant":
        del turns[systems]
    return check_turns(id, turns)


def _turn(id: str, number: int, message: Any) -> Turn:
    for role_key, text_key in _KEYS:
        if isinstance(message, Mapping) and role_key in message and text_key in message:
            role, text = message[role_key], message[text_key]
            if not isinstance(role, str) or role not in ROLES:
                raise BadItem("malformed", id, f"message {number}: expected a role of {', '.join(ROLES)}, got {role!r}")
            return Turn(ROLES[role], text_of(id, text))
    raise BadItem("malformed", id, f"message {number}: expected 'from' and 'value', got {_shown(message)}")


def text_of(id: str, value: Any) -> str:
    """A text or number as text. Raises `BadItem` for anything else, and for text that has no UTF-8 form."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadItem("malformed", id, f"expected a text, got {_shown(value)}")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadItem("malformed", id, "a text holds half of a surrogate pair, which is not valid Unicode") from None
    return text


def _shown(value: Any) -> str:
    return f"the keys {', '.join(map(str, value)) or 'none'}" if isinstance(value, Mapping) else repr(value)[:60]


def check_turns(id: str, turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turns, if they alternate from user to assistant (after at most one system turn) and none is blank. Raises
    `BadItem`.
    """
    body = turns[1:] if turns and turns[0].role == "system" else turns
    for number, turn in enumerate(body):
        expected = ("user", "assistant")[number % 2]
        if turn.role != expected:
            raise BadItem("roles do not alternate", id, f"turn {number + 1}: expected {expected}, got {turn.role}")
    if len(body) % 2 or not body:
        raise BadItem("no answer", id, "the last turn is not the assistant's")
    for number, turn in enumerate(turns):
        if not turn.text.strip():
            raise BadItem("empty turn", id, f"turn {number + 1}, of the {turn.role}")
    return tuple(turns)


def mark_front_of_turn(id: str, turns: Sequence[Turn], images: int) -> tuple[Turn, ...]:
    """In each turn with placeholders: all are removed, and one is put in front, on a line of its own."""
    return _check(id, [_to_front(turn) if IMAGE_MARKER in turn.text else turn for turn in turns], images)


def mark_in_place(id: str, turns: Sequence[Turn], images: int) -> tuple[Turn, ...]:
    """A single placeholder that does not stand first is moved to the front of its turn; several stay in place."""

    def marked(turn: Turn) -> Turn:
        moves = turn.text.count(IMAGE_MARKER) == 1 and not turn.text.startswith(IMAGE_MARKER)
        return _to_front(turn) if moves else turn

    return _check(id, [marked(turn) for turn in turns], images)


def mark_first_turn(id: str, turns: Sequence[Turn], images: int) -> tuple[Turn, ...]:
    """All images in front of the first user turn, unless the user's turns hold a placeholder for each already."""
    if images and not any(IMAGE_MARKER in turn.text for turn in turns):
        first = next(number for number, turn in enumerate(turns) if turn.role == "user")
        marked = f"{IMAGE_MARKER}\n" * images + turns[first].text
        turns = [*turns[:first], Turn("user", marked.strip()), *turns[first + 1 :]]
    return _check(id, turns, images)


def _to_front(turn: Turn) -> Turn:
    return turn._replace(text=f"{IMAGE_MARKER}\n{turn.text.replace(IMAGE_MARKER, '').strip()}".strip())


def _check(id: str, turns: Sequence[Turn], images: int) -> tuple[Turn, ...]:
    """One placeholder an image, all in user turns. Without images the texts are ordinary."""
    if images:
        users = sum(turn.text.count(IMAGE_MARKER) for turn in turns if turn.role == "user")
        others = sum(turn.text.count(IMAGE_MARKER) for turn in turns if turn.role != "user")
        detail = f"images {images}, placeholders {users} in user turns and {others} in others"
        if others or users > images:
            raise BadItem("placeholder without an image", id, detail)
        if users < images:
            raise BadItem("image without a placeholder", id, detail)
    return tuple(turns)
