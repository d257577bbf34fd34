"""Logits and generation with a loaded model.

    logits = forward(model, images, tokens)                       # the reference's input_ids -> float32[B, T, W]
    texts = generate(model, images, ["What is this?"], max_new_tokens=64)

Prefill and the decoding loop are compiled once for each model, batch size and length bucket.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from vlm_jax.core.errors import UserError
from vlm_jax.core.structs import Inputs
from vlm_jax.data import chat
from vlm_jax.data.rows import bucket
from vlm_jax.inference import decoding, programs
from vlm_jax.inference import prompts as host
from vlm_jax.inference.loading import Model


def forward(
    model: Model,
    images: Any | None,
    tokens: Any,
    mask: Any | None = None,
    answer: Any | None = None,
    questions: Sequence[str] | None = None,
) -> Float[Array, "B T W"]:
    """float32 logits of all positions; those of padding are undefined.

    Args:
        images: uint8[B, h, w, 3], or the reference's `pixel_values` with channels last, float[B, H, H, 3]; [B, M, ...]
            for M images a row; or a list with an entry for each row (`prompts.images_by_row`). None: text only.
        tokens: int[B, T], the reference's `input_ids`, with V placeholders for each image.
        mask: [B, T], 0 on padding; None: leading and trailing runs of the pad id are padding, unless it is an eos id.
        answer: [B, T], 1 on tokens after a bidirectional prefix (PaliGemma's suffix); None: all are prefix.
        questions: a text for each row, for question-dependent compressors; None: all text of the row.

    Raises `UserError` for placeholders that do not match the images, or rows longer than the model's context.
    """
    tokens = host.array_of("tokens", tokens)
    ids = None if questions is None else [_tokenizer(model).encode(question) for question in questions]
    by_row = host.images_by_row(model, images, len(tokens) if tokens.ndim else 0)
    inputs = host.inputs_of(model, by_row, tokens, mask, answer, ids)
    (rows, length), config = inputs.tokens.shape, (model.spec, model.compute, model.plan)
    inputs = host.put(host.to_bucket(inputs, model), model.plan)
    hidden = programs.hidden_program(*config)(model.params, inputs)
    return programs.logits_program(*config)(model.params, hidden[:, :length])[:rows]


def generate_tokens(
    model: Model,
    images: Any | None,
    tokens: Any,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    mask: Any | None = None,
    questions: Sequence[Sequence[int]] | None = None,
) -> Int[np.ndarray, "B new"]:
    """Continuations of rows of tokens (see `forward`); after eos a row is filled with eos.

    Args:
        max_new_tokens: None: the model's `answer_tokens`, within its context.
        temperature: 0 is greedy; above, tokens are sampled with a key of `seed` and the row's index.
        top_p: nucleus sampling: sample from the most likely tokens that together reach this probability.
        questions: token ids of each row's question, for question-dependent compressors; None: all text of the row.
    """
    tokens = host.array_of("tokens", tokens)
    by_row = host.images_by_row(model, images, len(tokens) if tokens.ndim else 0)
    inputs = host.inputs_of(model, by_row, tokens, mask, None, questions)
    return decode(model, inputs, max_new_tokens, temperature, top_p, seed)


def decode(
    model: Model,
    inputs: Inputs,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Int[np.ndarray, "B new"]:
    """`generate_tokens` of inputs on the host: prefill and decoding with the cached programs of their bucket."""
    rows, count = len(inputs.tokens), decoding.new_tokens(model, inputs, max_new_tokens)
    params = decoding.sampling_params(rows, count, temperature, top_p, seed)
    with decoding.memory_errors(rows, count):
        state, hidden = decoding.start(model, inputs, params, bucket(count))
        state = decoding.advance(model, state, params, count)
        out, hidden = jax.device_get((state.out, hidden))
    decoding.check_finite(model, hidden)
    return out[:rows, :count]


def generate(
    model: Model,
    images: Any | None,
    prompts: Any,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Generated texts of prompts.

    Args:
        images: an entry for each prompt: an image (a path, a PIL image, a uint8 array of any size, or float[H, H, 3] as
            in `forward`), a list of images, or None; None: text only.
        prompts: a list of texts, formatted with the model's chat template if it has one, or of lists of messages. A
            text with image placeholders ("USER: <image>\\nWhat is this? ASSISTANT:") is used as it is.

    Raises `UserError` for prompts that are longer than the model's context, or do not match the images.
    """
    rows = prompt_rows(model, images, prompts)
    if not rows.tokens:
        return []
    out = decode(model, inputs_of_rows(model, rows), max_new_tokens, temperature, top_p, seed)
    return [answer_text(model, row) for row in out.tolist()]


class PromptRows(NamedTuple):
    """Prompts as token ids, their prepared images, and the questions of a question-dependent compressor."""

    tokens: Sequence[host.Ids]
    images: list[list[np.ndarray]] | None
    questions: list[list[int]] | None


def prompt_rows(model: Model, images: Any | None, prompts: Any) -> PromptRows:
    """Arguments as in `generate`. Raises `UserError` for invalid ones."""
    tokenizer = _tokenizer(model)
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        actual = "one text" if isinstance(prompts, str) else type(prompts).__name__
        raise UserError(f"prompts: expected a list of texts, got {actual}")
    by_row = host.images_by_row(model, images, len(prompts))
    counts = [0] * len(prompts) if by_row is None else [len(images) for images in by_row]
    rows = [
        chat.prompt_ids(model.chat_format, tokenizer, prompt, model.image_token, model.visual_tokens, count)
        for prompt, count in zip(prompts, counts, strict=True)
    ]
    if not all(rows):
        raise UserError(f"prompt {[bool(row) for row in rows].index(False)} is empty")
    questions = None
    if model.reads_question and any(counts):
        questions = [question_ids(model, prompt) for prompt in prompts]
    return PromptRows(rows, by_row, questions)


def inputs_of_rows(model: Model, rows: PromptRows) -> Inputs:
    """`Inputs` on the host, rows padded on the right."""
    tokens, mask = host.padded(rows.tokens)
    return host.inputs_of(model, rows.images, tokens, mask, None, rows.questions)


def answer_text(model: Model, tokens: Sequence[int]) -> str:
    """The text of generated tokens, up to the first token that ends it."""
    return _tokenizer(model).decode(tokens[: answer_length(model, tokens)])


def answer_length(model: Model, tokens: Sequence[int]) -> int:
    """The number of generated tokens before the first that ends the answer."""
    return next((i for i, token in enumerate(tokens) if token in model.eos_ids), len(tokens))


def question_ids(model: Model, prompt: Any) -> list[int]:
    """Token ids of a prompt's question for the compressor: begin token and bare text without a template. Raises
    `UserError` for a prompt without text.
    """
    ids = _tokenizer(model).encode(chat.bare_question(model.chat_format, prompt))
    if not ids:
        raise UserError("the prompt is empty")
    return ids


def _tokenizer(model: Model) -> Any:
    if model.tokenizer is None or model.chat_format is None:
        raise UserError("this model came without a tokenizer: load it with tokenizer=PATH, or use generate_tokens")
    return model.tokenizer
