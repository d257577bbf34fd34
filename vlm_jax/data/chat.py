"""Prompts to token ids: chat templates and image placeholders.

    chat_format = chat_format_of("LlavaForConditionalGeneration", tokenizer, "<image>")
    ids = prompt_ids(chat_format, tokenizer, "What is this?", image_token_id=32000, visual_tokens=576)

A folder's own template is rendered as transformers does (`data.templates`). A folder without one uses its family's
template in `FAMILIES`; a base model gets the prompt unchanged.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vlm_jax.core.errors import UserError
from vlm_jax.data import template_process, templates
from vlm_jax.data.messages import (
    ContentFormat,
    Message,
    detect_content_format,
    format_messages,
    image_count_error,
    is_conversation,
)  # fmt: skip
from vlm_jax.data.tokenizers import Tokenizer

# Templates of the prompts that a family was trained with, for folders without one.
FAMILIES = {
    "LlavaForConditionalGeneration": (
        "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% elif m.role == 'assistant' %}"
        "ASSISTANT: {{ m.content }}{{ eos_token }}{% else %}{{ m.content }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
}
# Families whose processor builds the prompt itself: image, bos token, prompt, newline.
_PREFIX_FAMILIES = ("PaliGemmaForConditionalGeneration", "big_vision PaliGemma")


class ChatFormat(NamedTuple):
    """How a model's prompts are built."""

    kind: str  # "template", "prefix" (PaliGemma), "image first" (runs of `vlm_jax.train`), or "plain"
    template: str | None
    image_token: str  # text of the image token


def chat_format_of(architecture: str, tokenizer: Tokenizer, image_token: str = "<image>") -> ChatFormat:
    """The chat format of a published model, with the template of its folder if it has one."""
    if architecture in _PREFIX_FAMILIES:
        return ChatFormat("prefix", None, image_token)
    template = tokenizer.template or FAMILIES.get(architecture)
    return ChatFormat("template" if template else "plain", template, image_token)


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
    if not isinstance(prompt, str) and kind != "template":
        raise UserError(f"prompt: expected a string, got a list of messages (chat format {kind!r} has no template)")
    if kind == "image first":  # as in training
        return [image_token_id or 0] * (visual_tokens * images) + tokenizer.encode(f"{prompt}\n")
    if kind == "prefix":
        bos = tokenizer.special.get("bos_token", "")
        head, _, tail = prompt.rpartition(image_token) if images else ("", "", prompt)
        before = f"{head}{image_token}" if images and image_token in prompt else image_token * images
        ids = tokenizer.encode_without_special(f"{before}{bos}{tail}\n")
    elif isinstance(prompt, str) and (kind == "plain" or (images and image_token in prompt)):
        ids = tokenizer.encode(prompt if image_token in prompt else f"{image_token}\n" * images + prompt)
    else:
        ids = _templated_ids(chat_format, tokenizer, prompt, image_token_id is not None, images)
    if not images:
        return ids
    return expand_image_tokens(ids, tokenizer.id(image_token), image_token_id, visual_tokens, images)


def _templated_ids(
    chat_format: ChatFormat, tokenizer: Tokenizer, prompt: str | Sequence[Message], has_vision: bool, images: int
) -> list[int]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    content_format = _content_format(chat_format.template, tuple(tokenizer.special.items()), chat_format.image_token)
    messages = format_messages(messages, content_format, chat_format.image_token, images)
    text = render(chat_format.template, messages, tokenizer.special)
    # Templates write their own bos token; the processor of a vision-language model adds a missing one.
    has_bos = text.startswith(tokenizer.special.get("bos_token") or "\0")
    return tokenizer.encode_without_special(text) if has_bos or not has_vision else tokenizer.encode(text)


def expand_image_tokens(
    ids: Sequence[int], image_id: int | None, image_token_id: int | None, visual_tokens: int, images: int = 1
) -> list[int]:
    """Replaces each `image_id` (the tokenizer's id of "<image>") by `visual_tokens` times `image_token_id`. Raises
    `UserError` where `image_id` does not occur `images` times.
    """
    if (count := list(ids).count(image_id)) != images:  # type: ignore[arg-type]
        raise image_count_error(count, images)
    placeholders = [image_token_id] * visual_tokens
    return [i for token in ids for i in (placeholders if token == image_id else [token])]  # type: ignore[misc]


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


@functools.lru_cache(maxsize=32)
def _content_format(template: str, special: tuple[tuple[str, str], ...], image_token: str) -> ContentFormat:
    return detect_content_format(lambda messages: render(template, messages, dict(special)), image_token)


def render(template: str, messages: Sequence[Message], special: Mapping[str, str]) -> str:
    """The text of messages in a chat template, with the generation prompt. Raises `UserError` with the template's
    error. A template of a folder has limits on time, memory and length (`data.template_process`).
    """
    run = templates.render if template in FAMILIES.values() else template_process.render
    try:
        return run(template, messages, [(len(messages), True)], special)[0].text
    except templates.TemplateError as error:
        raise UserError(str(error)) from error
