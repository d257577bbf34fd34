"""Logits and generation with a loaded model.

    logits = forward(model, images, tokens)                       # the reference's input_ids -> float32[B, T, W]
    texts = generate(model, images, ["What is this?"], max_new_tokens=64)

Prefill and the decoding loop are compiled once for each model, batch size and length bucket.
"""

import numbers
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from vlm_jax.core.errors import UserError
from vlm_jax.core.structs import Inputs
from vlm_jax.data import chat
from vlm_jax.inference import programs
from vlm_jax.inference import prompts as host
from vlm_jax.inference.loading import Model, as_int, check_seed

_MAX_CONTEXT = 2**20  # where a model's context is unknown


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
    return _decode(model, inputs, max_new_tokens, temperature, top_p, seed)


def _decode(
    model: Model, inputs: Inputs, max_new_tokens: int | None, temperature: Any, top_p: Any, seed: Any
) -> Int[np.ndarray, "B new"]:
    """Prefill and sample with the cached programs of the model and of the inputs' bucket."""
    seed, temperature, top_p = check_seed(seed), *_check_sampling(temperature, top_p)
    max_new_tokens = _new_tokens(model, inputs, max_new_tokens)
    rows, max_new = inputs.tokens.shape[0], host.bucket(max_new_tokens)
    config, kind = (model.spec, model.compute, model.plan), "greedy" if temperature == 0 else "sampled"
    inputs = host.put(host.to_bucket(inputs, model), model.plan)
    settings = (np.int32(max_new_tokens), jax.random.key(seed), temperature, top_p)
    try:
        prefilled = programs.prefill_program(*config, max_new)(model.params, inputs)
        sample = programs.sample_program(*config, model.eos_ids, max_new, kind)
        out, prefilled = sample(model.params, prefilled, *settings)
        out, hidden = jax.device_get((out, prefilled.hidden))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"{rows} rows and {max_new_tokens} new tokens do not fit into memory: ask for fewer") from error
    if not np.isfinite(hidden).all():
        raise UserError(f"hidden states are not finite: weights are damaged, or out of range for {model.compute.dtype}")
    return out[:rows, :max_new_tokens]


def _check_sampling(temperature: Any, top_p: Any) -> tuple[np.float32, np.float32]:
    if not isinstance(temperature, numbers.Real) or not temperature >= 0:
        raise UserError(f"temperature: expected 0 (greedy) or more, got {temperature!r}")
    if not isinstance(top_p, numbers.Real) or not 0 < top_p <= 1:
        raise UserError(f"top_p: expected a probability above 0, 1 for all tokens, got {top_p!r}")
    # What is below the smallest normal float32 is 0 on the device: greedy.
    is_greedy = temperature < np.finfo(np.float32).tiny
    return np.float32(0 if is_greedy else temperature), np.float32(top_p)


def _new_tokens(model: Model, inputs: Inputs, count: int | None) -> int:
    """`max_new_tokens`. Raises `UserError` for more than the context allows after the longest prompt."""
    longest = int((inputs.segment != 0).sum(axis=1).max())
    limit = (model.spec.decoder.context or _MAX_CONTEXT) - longest
    if limit < 1:
        raise UserError(f"a prompt of {longest} tokens fills this model's context: shorten it")
    count = as_int("max_new_tokens", min(model.answer_tokens, limit) if count is None else count)
    if not 1 <= count <= limit:
        raise UserError(f"max_new_tokens: expected 1 to {limit} after a prompt of {longest} tokens, got {count}")
    return count


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
    tokenizer = _tokenizer(model)
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        actual = "one text" if isinstance(prompts, str) else type(prompts).__name__
        raise UserError(f"prompts: expected a list of texts, got {actual}")
    by_row = host.images_by_row(model, images, len(prompts))
    if not prompts:
        return []
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
    tokens, mask = host.padded(rows)
    inputs = host.inputs_of(model, by_row, tokens, mask, None, questions)
    out = _decode(model, inputs, max_new_tokens, temperature, top_p, seed)
    lengths = [next((i for i, token in enumerate(row) if token in model.eos_ids), len(row)) for row in out.tolist()]
    return [tokenizer.decode(row[:length]) for row, length in zip(out.tolist(), lengths, strict=True)]


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
