"""Prompts to token ids: chat templates and image placeholders.

    chat_format = chat_format_of("LlavaForConditionalGeneration", tokenizer, "<image>")
    ids = prompt_ids(chat_format, tokenizer, "What is this?", image_token_id=32000, visual_tokens=576)

`data.conversations` tokenizes for training with the same functions: up to an answer the ids are those of the prompt.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vlm_jax.core.errors import UserError
from vlm_jax.data import template_process, templates
from vlm_jax.data.chat_formats import OWN_TEMPLATES, ChatFormat
from vlm_jax.data.messages import (
    ContentFormat,
    Message,
    detect_content_format,
    format_messages,
    image_count_error,
    is_conversation,
)  # fmt: skip
from vlm_jax.data.templates import Rendered
from vlm_jax.data.tokenizers import Tokenizer

IMAGE = -1  # stands for an image in ids, until it is expanded to its visual tokens


class Encoded(NamedTuple):
    """Token ids of a text, without begin and end tokens, and the characters of each."""

    ids: list[int]  # IMAGE for each image token
    offsets: list[tuple[int, int]]


def prompt_ids(
    chat_format: ChatFormat,
    tokenizer: Tokenizer,
    prompt: Any,
    image_token_id: int | None,
    visual_tokens: int,
    images: int = 1,
) -> list[int]:
    """Token ids of one prompt, with each image as `visual_tokens` times `image_token_id`.

    A string that contains the image token ("USER: <image>\\nWhat is this? ASSISTANT:") skips the template. A list of
    messages goes through it.

    Raises `UserError` for messages that the template rejects, messages for a model without a template, or a number of
    image placeholders other than `images`.
    """
    if not isinstance(prompt, str) and not is_conversation(prompt):
        raise UserError("prompt: expected a string or a list of messages, objects with `role` and `content`")
    images = images if image_token_id is not None and visual_tokens else 0
    image_token, kind = chat_format.image_token, chat_format.kind
    if kind == "prefix":
        ids = prefix_prompt(chat_format, tokenizer, prompt, images)
    elif kind == "text" and not isinstance(prompt, str):
        raise UserError("prompt: expected a string, got a list of messages (the model has no chat template)")
    else:
        has_template = kind == "template" and not (isinstance(prompt, str) and images and image_token in prompt)
        if has_template:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            text = render(chat_format, tokenizer, messages, images)
        else:
            text = prompt if image_token in prompt else f"{image_token}\n" * images + prompt
        if image_token_id is not None and not images and image_token in text:
            raise image_count_error(text.count(image_token), images)
        ids = encode(chat_format, tokenizer, text, images).ids
        if not has_template or adds_begin(chat_format, tokenizer, text, image_token_id is not None):
            ids = [*tokenizer.begin, *ids, *tokenizer.end]
    if (count := ids.count(IMAGE)) != images:
        raise image_count_error(count, images)
    return expand_images(ids, image_token_id, visual_tokens)


def expand_images(ids: Sequence[int], image_token_id: int | None, visual_tokens: int) -> list[int]:
    """Replaces each IMAGE by `visual_tokens` times `image_token_id`."""
    placeholders = [image_token_id] * visual_tokens
    return [i for token in ids for i in (placeholders if token == IMAGE else [token])]  # type: ignore[misc]


def adds_begin(chat_format: ChatFormat, tokenizer: Tokenizer, text: str, has_vision: bool) -> bool:
    """Whether the tokenizer's begin token comes before a rendered text. Templates write their own; the processor of a
    vision-language model adds a missing one, and so does LLaVA to its formats.
    """
    has_begin = text.startswith(tokenizer.special.get("bos_token") or "\0")
    return not has_begin and (has_vision or chat_format.images == "split")


def prefix_prompt(chat_format: ChatFormat, tokenizer: Tokenizer, prompt: Any, images: int) -> list[int]:
    """PaliGemma's prompt: the images, begin token, text, newline. Of a string with image tokens, what comes before the
    last of them stays there, as its processor does.
    """
    image_token, bos = chat_format.image_token, tokenizer.special.get("bos_token", "")
    if isinstance(prompt, str):
        head, found, tail = prompt.rpartition(image_token) if images else ("", "", prompt)
        before = f"{head}{image_token}" if found else image_token * images
    else:
        if len(prompt) != 1 or not isinstance(prompt[0].get("content"), str):
            raise UserError("prompt: expected a string, or one message of text (chat format 'prefix')")
        before, tail = image_token * images, texts_after_images(chat_format, [prompt[0]["content"]], images)[0]
    return encode(chat_format, tokenizer, f"{before}{bos}{tail}\n", images).ids


def texts_after_images(chat_format: ChatFormat, texts: Sequence[str], images: int) -> list[str]:
    """Questions without image tokens, of a format with all images in front. Raises `UserError` where there are some,
    but not `images`.
    """
    image_token = chat_format.image_token
    count = sum(text.count(image_token) for text in texts) if images else 0
    if count not in (0, images):
        raise image_count_error(count, images)
    return [text.replace(f"{image_token}\n", "").replace(image_token, "") if count else text for text in texts]


def encode(chat_format: ChatFormat, tokenizer: Tokenizer, text: str, images: int) -> Encoded:
    """Ids of a text. Without images, an image token in it is ordinary text.

    Raises `UserError` where the tokenizer cannot read it as ordinary text.
    """
    image_token = chat_format.image_token
    if image_token not in text:
        return Encoded(*tokenizer.encode_with_offsets(text))
    is_split = chat_format.kind == "prefix" or chat_format.images == "split"
    image_id = None if images and is_split else tokenizer.id(image_token)
    if not images:
        if image_id is not None:
            tokenizer = tokenizer.without_extra()
        if image_id is not None and tokenizer.id(image_token) is not None:
            raise UserError(f"text: expected no {image_token} without an image (the tokenizer has no other)")
        return Encoded(*tokenizer.encode_with_offsets(text))
    if image_id is not None:
        ids, offsets = tokenizer.encode_with_offsets(text)
        return Encoded([IMAGE if i == image_id else i for i in ids], offsets)
    ids, offsets, start = [], [], 0
    for piece in text.split(image_token):
        if start:
            ids.append(IMAGE)
            offsets.append((start - len(image_token), start))
        piece_ids, piece_offsets = tokenizer.encode_with_offsets(piece) if piece else ([], [])
        ids += piece_ids
        offsets += [(begin + start, end + start) for begin, end in piece_offsets]
        start += len(piece) + len(image_token)
    return Encoded(ids, offsets)


def bare_question(chat_format: ChatFormat, prompt: Any) -> str:
    """The question of a prompt, without images and template: the text of the first user message; of a string with image
    tokens, what follows the first of them up to "ASSISTANT" (as the official QueCC cuts LLaVA's prompts).
    """
    image_token = chat_format.image_token
    if isinstance(prompt, str):
        if image_token not in prompt:
            return prompt
        tail = prompt.partition(image_token)[2].replace(image_token, "")
        return tail.partition("ASSISTANT")[0].strip()
    content = next((message.get("content") for message in prompt if message.get("role") == "user"), "")
    parts = [content] if isinstance(content, str) else content or ()
    texts = (part if isinstance(part, str) else part.get("text", "") for part in parts)
    return "\n".join(text for text in texts if text).replace(image_token, "").strip()


def render(chat_format: ChatFormat, tokenizer: Tokenizer, messages: Sequence[Message], images: int) -> str:
    """The text of messages with the generation prompt. Raises `UserError` with the template's error. A template of a
    folder has limits on time, memory and length (`data.template_process`).
    """
    messages, special = _prepare(chat_format, tokenizer, messages, images)
    return _render(chat_format.template or "", messages, special)


def render_answers(chat_format: ChatFormat, tokenizer: Tokenizer, messages: Sequence[Message], images: int) -> Rendered:
    """The text of a conversation and the characters of its answers (`templates.render_answers`)."""
    template = chat_format.template or ""
    messages, special = _prepare(chat_format, tokenizer, messages, images)
    if template not in OWN_TEMPLATES:
        return template_process.render_answers(template, messages, special, tokenizer.special_tokens)
    try:
        return templates.render_answers(template, messages, special, ())
    except templates.TemplateError as error:
        raise UserError(str(error)) from error


def _render(template: str, messages: Sequence[Message], special: Mapping[str, str]) -> str:
    if template not in OWN_TEMPLATES:
        return template_process.render(template, messages, special, True)
    try:
        return templates.render(template, messages, special, True)
    except templates.TemplateError as error:
        raise UserError(str(error)) from error


def _prepare(
    chat_format: ChatFormat, tokenizer: Tokenizer, messages: Sequence[Message], images: int
) -> tuple[list[Message], dict[str, str]]:
    """Messages as the template reads them, and its special tokens."""
    template, image_token, special = chat_format.template or "", chat_format.image_token, tokenizer.special
    if template in OWN_TEMPLATES:
        # Without images, nothing in a text is an image token.
        content_format, special = (
            ContentFormat(True, False, False),
            {**special, "image_token": image_token if images else "\0"},
        )
    else:
        content_format = _content_format(template, tuple(special.items()), image_token)
    return format_messages(messages, content_format, image_token, images), special


@functools.lru_cache(maxsize=32)
def _content_format(template: str, special: tuple[tuple[str, str], ...], image_token: str) -> ContentFormat:
    return detect_content_format(lambda messages: _render(template, messages, dict(special)), image_token)
