"""Conversations to token ids and the tokens that are learned.

    conversation = tokenize(format_named("v1", tokenizer), tokenizer, example.turns, images=len(example.images))

The text is tokenized once. A token is learned if one of its characters belongs to an answer, with the end token behind
it and without the newline behind that. Up to an answer the ids are those of `chat.prompt_ids` for the turns before it.
Special tokens in a turn's text are special tokens, as in the references: they do not end an answer's span.
"""

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

from vlm_jax.core.errors import UserError
from vlm_jax.data import chat
from vlm_jax.data.chat import IMAGE
from vlm_jax.data.chat_formats import ChatFormat
from vlm_jax.data.messages import image_count_error
from vlm_jax.data.tokenizers import Tokenizer

PLACEHOLDER = "<image>"  # in the text of a turn


class Conversation(NamedTuple):
    """A tokenized conversation."""

    ids: list[int]  # IMAGE (-1) stands for one image
    target: list[bool]  # this token is learned
    turn_ends: list[int]  # length of `ids` up to the end of each answer, where a long conversation may be cut


def tokenize(
    chat_format: ChatFormat, tokenizer: Tokenizer, turns: Sequence[Any], images: int | None = None
) -> Conversation:
    """The ids of turns (`role`, `text`) and which of them are learned.

    Args:
        images: of the example; None: as many as the turns have placeholders "<image>". Without images a placeholder is
            ordinary text.

    Raises `UserError` for turns without an answer, as many placeholders as there are not images, or turns that the
    template rejects.
    """
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    if not answers or not all(map(str.strip, answers)):
        raise UserError(f"turns: expected an answer (role 'assistant'), got {'an empty one' if answers else 'none'}")
    images = sum(turn.text.count(PLACEHOLDER) for turn in turns) if images is None else images
    messages = messages_of(turns, chat_format.image_token if images else PLACEHOLDER)
    if chat_format.kind == "prefix":
        return _tokenize_prefix(chat_format, tokenizer, messages, images)
    if chat_format.kind != "template":
        raise UserError("turns: the model has no chat template: name a chat format ('v1', 'chatml', 'prefix', ...)")
    text, spans = chat.render_answers(chat_format, tokenizer, messages, images)
    ids, offsets = chat.encode(chat_format, tokenizer, text, images)
    if (count := ids.count(IMAGE)) != images:
        raise image_count_error(count, images)
    begin = tokenizer.begin if chat.adds_begin(chat_format, tokenizer, text, has_vision=True) else ()
    ends, starts = [end for _, end in offsets], [start for start, _ in offsets]
    target, turn_ends = [False] * len(ids), []
    for start, end in spans:
        first, last = bisect.bisect_right(ends, start), bisect.bisect_left(starts, end)
        target[first:last] = [True] * (last - first)
        turn_ends.append(len(begin) + max(first, last))
    learned = {tokenizer.id(token) for token in chat_format.learned_tokens}
    if learned or images:
        target = [(one or token in learned) and token != IMAGE for one, token in zip(target, ids, strict=True)]
    return Conversation([*begin, *ids], [False] * len(begin) + target, turn_ends)


def _tokenize_prefix(
    chat_format: ChatFormat, tokenizer: Tokenizer, messages: Sequence[dict[str, str]], images: int
) -> Conversation:
    """PaliGemma: images, begin token, question, newline; answer, end token. Each part is tokenized alone. Further
    questions and answers follow in the same way.
    """
    bos = tokenizer.special.get("bos_token", "")
    if not tokenizer.eos_ids:
        raise UserError("chat format 'prefix': expected a tokenizer with an end token, got one without")
    questions = [message["content"] for message in messages if message["role"] != "assistant"]
    texts = iter(chat.texts_after_images(chat_format, questions, images))
    ids, target, turn_ends = [IMAGE] * images, [False] * images, []
    for message in messages:
        is_answer = message["role"] == "assistant"
        if is_answer:
            part = [*chat.encode(chat_format, tokenizer, message["content"], 0).ids, tokenizer.eos_ids[0]]
        else:
            part = chat.encode(chat_format, tokenizer, f"{bos}{next(texts)}\n", 0).ids
            bos = ""
        ids += part
        target += [is_answer] * len(part)
        turn_ends += [len(ids)] if is_answer else []
    return Conversation(ids, target, turn_ends)


def messages_of(turns: Sequence[Any], image_token: str = PLACEHOLDER) -> list[dict[str, str]]:
    """Turns as the messages of `chat.prompt_ids`."""
    if image_token == PLACEHOLDER:
        return [{"role": turn.role, "content": turn.text} for turn in turns]
    return [{"role": turn.role, "content": turn.text.replace(PLACEHOLDER, image_token)} for turn in turns]


def bare_question(turns: Sequence[Any]) -> str:
    """The first question without images, for compressors that read it."""
    text = next((turn.text for turn in turns if turn.role == "user"), "")
    return text.replace(PLACEHOLDER, "").strip()


def without_images(turns: Sequence[Any]) -> list[Any]:
    """The turns (named tuples) without placeholders, for a model without visual tokens."""
    return [turn._replace(text=turn.text.replace(f"{PLACEHOLDER}\n", "").replace(PLACEHOLDER, "")) for turn in turns]
