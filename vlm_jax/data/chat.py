"""From a question to the ids that a model reads: chat templates, and the place of the image.

    layout = chat_format_of("LlavaForConditionalGeneration", text, "<image>")
    ids = prompt_ids(layout, text, "What is this?", image_token=32000, visual_tokens=576)

A folder's own template is rendered as the reference does: sandboxed Jinja with `trim_blocks` and `lstrip_blocks`,
`raise_exception`, `strftime_now`, `tojson` and the `generation` tag. Where a folder has none, its family's prompt
stands in `FAMILIES`; a base model reads the prompt as it is.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2 import ext, nodes, sandbox

from vlm_jax.core.errors import UserError
from vlm_jax.data import messages
from vlm_jax.data.messages import Message
from vlm_jax.data.tokenizers import Tokenizer

# Our words for prompts that a family was trained with, for folders that hold no template.
FAMILIES = {
    "LlavaForConditionalGeneration": (
        "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% elif m.role == 'assistant' %}"
        "ASSISTANT: {{ m.content }}{{ eos_token }}{% else %}{{ m.content }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
}
# Families whose processor writes the prompt itself: image, begin token, prompt, new line.
_PREFIX_FAMILIES = ("PaliGemmaForConditionalGeneration", "big_vision PaliGemma")


class ChatFormat(NamedTuple):
    """How a question becomes a prompt."""

    kind: str  # "template", "prefix" (PaliGemma), "image first" (this project's runs), or "plain"
    template: str | None
    image: str  # the text that stands for an image


def chat_format_of(architecture: str, text: Tokenizer, image: str = "<image>") -> ChatFormat:
    """The layout of a published model, from its own template if it has one."""
    if architecture in _PREFIX_FAMILIES:
        return ChatFormat("prefix", None, image)
    template = text.template or FAMILIES.get(architecture)
    return ChatFormat("template" if template else "plain", template, image)


def prompt_ids(
    layout: ChatFormat, text: Tokenizer, prompt: Any, image_token: int | None, visual_tokens: int, images: int = 1
) -> list[int]:
    """The ids of one prompt, with `visual_tokens` placeholders where each of its images stands.

    A prompt that names its images itself ("USER: <image>\\nWhat is this? ASSISTANT:") is taken as it is. A list of
    messages goes through the template, in the form that it reads.

    Raises `UserError` for a template that refuses the messages, messages for a model without a template, or places for
    another number of images than there are.
    """
    if not isinstance(prompt, str) and not messages.are_messages(prompt):
        raise UserError("a prompt is a text, or a list of messages: objects with `role` and `content`")
    images = images if image_token is not None and visual_tokens else 0
    mark = layout.image
    if layout.kind == "image first":
        return [image_token or 0] * (visual_tokens * images) + text.encode(f"{_only_text(prompt)}\n")  # as in training
    if layout.kind == "prefix":
        ids = text.encode_without_special(_prefix_prompt(layout, text, _only_text(prompt), images))
    elif isinstance(prompt, str) and (layout.kind == "plain" or (images and mark in prompt)):
        ids = text.encode(prompt if mark in prompt else f"{mark}\n" * images + prompt)
    elif layout.template is None:
        raise UserError("this model has no chat template: give the prompt as one text")
    else:
        talk = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        what = _reads(layout.template, tuple(text.special.items()), mark)
        talk = messages.shaped(talk, what, mark, images)
        rendered = render(layout.template, talk, text.special)
        # A template writes its own begin token; of a model that sees, the processor adds one where it did not.
        begins = rendered.startswith(text.special.get("bos_token") or "\0")
        ids = text.encode_without_special(rendered) if begins or image_token is None else text.encode(rendered)
    return expanded(ids, text.id(mark), image_token, visual_tokens, images) if images else ids


def expanded(
    ids: Sequence[int], written: int | None, image_token: int | None, visual_tokens: int, images: int = 1
) -> list[int]:
    """Each image mark (the tokenizer's id of "<image>") as a run of `visual_tokens` placeholders. Raises `UserError`
    where there are not as many marks as images.
    """
    if (places := list(ids).count(written)) != images:  # type: ignore[arg-type]
        raise UserError(f"the prompt has {places} places for images: expected {images}, one for each image given")
    run = [image_token] * visual_tokens
    return [one for token in ids for one in (run if token == written else [token])]  # type: ignore[misc]


def bare_question(layout: ChatFormat, prompt: Any) -> str:
    """What a prompt asks, without images and template: the text of the first message of the user's; of a text that
    names its images itself, what stands behind the first image, up to the answer's role (as the official QueCC reads a
    prompt of LLaVA's).
    """
    if isinstance(prompt, str):
        if layout.image not in prompt:
            return prompt
        behind = prompt.partition(layout.image)[2].replace(layout.image, "")
        return behind.partition("ASSISTANT")[0].strip()
    content = next((message.get("content") for message in prompt if message.get("role") == "user"), "")
    parts = [content] if isinstance(content, str) else content or ()
    texts = (part if isinstance(part, str) else part.get("text", "") for part in parts)
    return "\n".join(one for one in texts if one).replace(layout.image, "").strip()


def _only_text(prompt: str | Sequence[Message]) -> str:
    if not isinstance(prompt, str):
        raise UserError("this model reads one text, not a list of messages")
    return prompt


def _prefix_prompt(layout: ChatFormat, text: Tokenizer, prompt: str, images: int) -> str:
    bos, mark = text.special.get("bos_token", ""), layout.image
    if images and mark in prompt:
        head, _, tail = prompt.rpartition(mark)
        return f"{head}{mark}{bos}{tail}\n"
    return f"{mark * images}{bos}{prompt}\n"


@functools.lru_cache(maxsize=32)
def _reads(template: str, special: tuple[tuple[str, str], ...], mark: str) -> messages.Reads:
    return messages.reads(lambda trial: render(template, trial, dict(special)), mark)


def render(template: str, talk: Sequence[Message], special: Mapping[str, str]) -> str:
    """A chat template on messages, up to where the answer begins. Raises `UserError` with the template's complaint."""
    try:
        return _compiled(template).render(
            messages=talk, tools=None, documents=None, add_generation_prompt=True, **special
        )
    except UserError:
        raise
    except Exception as error:  # a template is a program of the folder's: whatever it raises is its own
        raise UserError(f"the chat template does not take these messages: {error or type(error).__name__}") from error


class _Generation(ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what training learns; here it is its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_refuse, strftime_now=lambda form: datetime.datetime.now().strftime(form)
    )
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is not valid Jinja (line {error.lineno}): {error.message}") from error
    except (RecursionError, SyntaxError, UnicodeEncodeError) as error:
        raise UserError(f"the chat template cannot be compiled: {type(error).__name__}") from error


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
