"""Chat formats by name: the conversations that published recipes train on.

    chat_format = format_named("v1", tokenizer)          # LLaVA-1.5's second stage
    chat_format = format_named("template", tokenizer)    # the chat template of the tokenizer's folder

Texts and losses are those of `llava/train/train.py` in LLaVA and LLaVA-NeXT; `generation` tags say what is learned.
"""

from typing import NamedTuple

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.data.tokenizers import Tokenizer


class ChatFormat(NamedTuple):
    """How a model's prompts and conversations are built."""

    kind: str  # "template", "prefix" (image, begin token, question, newline), or "text": the prompt unchanged
    template: str | None
    image_token: str  # text of the image token
    images: str = "special"  # or "split": the text on each side of an image is tokenized alone, as LLaVA does
    learned_tokens: tuple[str, ...] = ()  # that are learned wherever they stand


class _Named(NamedTuple):
    template: str
    images: str = "split"
    learned_tokens: tuple[str, ...] = ()


_SYSTEM = "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}SYSTEM{% endif %}"
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
_LLAMA = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\nIf a question does not make "
    "any sense, or is not factually coherent, explain why instead of answering something not correct. If you don't "
    "know the answer to a question, please don't share false information."
)
_LLAVA_LLAMA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
_QWEN = "You are a helpful assistant."

_V1 = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% elif m.role == 'assistant' %}ASSISTANT:"
    "{% generation %} {{ m.content }}{{ eos_token }}{% endgeneration %}{% elif not loop.first %}{{ m.content }} "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_LLAMA_2 = (
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}{% if loop.first %}[INST] <<SYS>>\n"
    f"{_SYSTEM}{{{{ '\\n<</SYS>>\\n\\n' }}}}{{% else %}}{{{{ bos_token }}}}[INST] {{% endif %}}"
    "{{ m.content }} [/INST]{% else %}{% generation %} {{ m.content }} {{ eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)
# {HEAD} and {TAIL} are in the loss or out of it; {LINE} is a newline behind each message, or nothing.
_CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nSYSTEM<|im_end|>{{ LINE }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}HEAD{{ m.content }}<|im_end|>TAIL{% else %}"
    "<|im_start|>{{ m.role }}{{ '\\n' }}{{ m.content }}<|im_end|>{{ LINE }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
)
_HEADER = "<|im_start|>assistant{{ '\\n' }}"
_PLAIN = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ image_token * (m.content.split(image_token) | length - 1) }}"
    "{% elif m.role == 'assistant' %}{% generation %}{{ m.content }}{{ '\\n' }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)


def _chatml(system: str, line: str, head: str, tail: str) -> str:
    parts = {"SYSTEM": system, "LINE": line, "HEAD": head, "TAIL": tail}
    template = _CHATML
    for name, text in parts.items():
        template = template.replace(name, text)
    return template


_ANSWER = (f"{_HEADER}{{% generation %}}", "{% endgeneration %}")
_NAMED = {
    "plain": _Named(_PLAIN),
    "v1": _Named(f"{_SYSTEM.replace('SYSTEM', _VICUNA)} {_V1}"),
    "llama_2": _Named(_LLAMA_2.replace("SYSTEM", _LLAMA)),
    "llava_llama_2": _Named(_LLAMA_2.replace("SYSTEM", _LLAVA_LLAMA)),
    "mpt": _Named(_chatml(_MPT, "''", *_ANSWER)),
    "chatml": _Named(_chatml(_QWEN, "'\\n'", _ANSWER[0], _ANSWER[1] + "{{ '\\n' }}"), "special"),
    # LLaVA-NeXT's `preprocess_qwen` learns the assistant's headers, and newlines and role tokens of every turn.
    "qwen_headers": _Named(
        _chatml(_QWEN, "'\\n'", "{% generation %}" + _HEADER, "{{ '\\n' }}{% endgeneration %}"),
        "special",
        ("\n", "<|im_start|>", "<|im_end|>"),
    ),
}
_ALIASES = {
    "vicuna": "v1", "vicuna_v1": "v1", "llama2": "llama_2", "qwen": "chatml", "qwen_1_5": "chatml", "qwen_2": "chatml",
    "paligemma": "prefix",
}  # fmt: skip
NAMES = ("template", "prefix", *_NAMED)

# Templates of the prompts that a family was trained with, for folders without one.
FAMILIES = {
    "LlavaForConditionalGeneration": (
        "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% elif m.role == 'assistant' %}"
        "ASSISTANT:{% generation %} {{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }} "
        "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
}
# Families whose own code formats prompts, whatever template a folder has.
_NAMED_FAMILIES = {"LlavaLlamaForCausalLM": "v1"}
# Families whose processor builds the prompt itself.
_PREFIX_FAMILIES = ("PaliGemmaForConditionalGeneration", "big_vision PaliGemma")
OWN_TEMPLATES = frozenset((*FAMILIES.values(), *(named.template for named in _NAMED.values())))


def chat_format_of(architecture: str, tokenizer: Tokenizer, image_token: str = "<image>") -> ChatFormat:
    """The chat format of a published model, with the template of its folder if it has one."""
    if architecture in _PREFIX_FAMILIES:
        return ChatFormat("prefix", None, image_token)
    if architecture in _NAMED_FAMILIES:
        return format_named(_NAMED_FAMILIES[architecture], tokenizer, image_token)
    template = tokenizer.template or FAMILIES.get(architecture)
    return ChatFormat("template" if template else "text", template, image_token)


def for_evaluation(name: str) -> str:
    """The format with the same text in which an answer is its text and end token alone."""
    return "chatml" if _plain(name) == "qwen_headers" else name


def _plain(name: str) -> str:
    """A format's name in `NAMES`, if it is one or an alias of one."""
    plain_name = str(name).lower().replace("-", "_")
    return _ALIASES.get(plain_name, plain_name)


def format_named(name: str, tokenizer: Tokenizer, image_token: str = "<image>") -> ChatFormat:
    """The chat format of a name in `NAMES`, or of its usual other names ("vicuna_v1", "llama2", "qwen").

    Raises `UserError` for an unknown name, "template" without a chat template, or a tokenizer without the tokens that
    the format ends answers with.
    """
    plain_name = _plain(name)
    if plain_name not in NAMES:
        raise unknown("chat format", name, NAMES)
    if plain_name == "prefix":
        return ChatFormat("prefix", None, image_token)
    if plain_name == "template":
        if not tokenizer.template:
            others = ", ".join(other for other in NAMES if other != "template")
            raise UserError(f"chat format 'template': the tokenizer has no chat template: choose one of {others}")
        return ChatFormat("template", tokenizer.template, image_token)
    named = _NAMED[plain_name]
    for token in ("bos_token", "eos_token"):
        if f"{{{{ {token} }}}}" in named.template and not tokenizer.special.get(token):
            raise UserError(f"chat format {name!r}: expected a tokenizer with a {token}, got one without")
    if "<|im_end|>" in named.template and tokenizer.id("<|im_end|>") is None:
        raise UserError(f"chat format {name!r}: expected a tokenizer with the token <|im_end|>, got one without")
    return ChatFormat("template", named.template, image_token, named.images, named.learned_tokens)
