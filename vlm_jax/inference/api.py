"""What a loaded model does: logits of given tokens, and answers to prompts.

    logits = forward(model, images, tokens)                       # the reference's input_ids -> float32[B, T, W]
    texts = generate(model, images, ["What is this?"], max_new_tokens=64)

Inputs are checked before anything runs (`prompts`). Two programs are compiled for each model, batch size and length
bucket: prefill, and the loop of decode steps.
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
from vlm_jax.inference.loading import Model, checked_seed, whole
from vlm_jax.models.vlm import Vlm

_LONGEST = 2**20  # tokens of a row, where a model's context is not known


def forward(
    model: Model,
    images: Any | None,
    tokens: Any,
    mask: Any | None = None,
    answer: Any | None = None,
    questions: Sequence[str] | None = None,
) -> Float[Array, "B T W"]:
    """Logits of every position, float32; those of padding mean nothing.

    Args:
        images: uint8[B, h, w, 3], or float[B, H, H, 3]: the reference's `pixel_values` with channels last; with M
            images a row [B, M, ...]; or a list with an entry a row (`prompts.images_by_row`). None for text alone.
        tokens: int[B, T], the reference's `input_ids`: V placeholders where each of a row's images stands.
        mask: [B, T], 0 on padding; None takes leading and trailing runs of the pad id for padding, unless that id also
            ends answers: then every token is real.
        answer: [B, T], 1 on the tokens behind a two-way prefix (PaliGemma's suffix); None: all belong to the prefix.
        questions: a text a row, for compressors that read the question; None: all text of the row.

    Raises `UserError` for a row whose placeholders do not fit its images, or that is longer than the model's context,
    before anything runs.
    """
    tokens = host.array_of("tokens", tokens)
    ids = None if questions is None else [_tokenizer(model).encode(one) for one in questions]
    by_row = host.images_by_row(model, images, len(tokens) if tokens.ndim else 0)
    inputs = host.inputs_of(model, by_row, tokens, mask, answer, ids)
    (rows, length), config = inputs.tokens.shape, (model.spec, model.compute, model.plan)
    inputs = host.put(host.to_bucket(inputs, model.visual_tokens), model.plan)
    hidden = programs.hidden_program(*config)(model.params, inputs)
    # Of the tokens alone: those of padding would be large in vain.
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
    """Continuations of rows of tokens, as `forward` takes them. An end token ends its row and fills what follows.

    Args:
        max_new_tokens: None is the model's `answer_tokens`, or what its context leaves of them.
        temperature: 0 is greedy; above, tokens are drawn with keys that follow from `seed` and the row's number ...
        top_p: ... of the likeliest words that together reach this probability.
        questions: ids of what each row asks, for compressors that read the question; None: all text of the row.
    """
    seed, temperature, top_p = checked_seed(seed), *_checked_sampling(temperature, top_p)
    tokens = host.array_of("tokens", tokens)
    by_row = host.images_by_row(model, images, len(tokens) if tokens.ndim else 0)
    inputs = host.inputs_of(model, by_row, tokens, mask, None, questions)
    max_new_tokens = _new_tokens(model, inputs, max_new_tokens)
    rows, room = inputs.tokens.shape[0], host.bucket(max_new_tokens)
    config, kind = (model.spec, model.compute, model.plan), "greedy" if temperature == 0 else "sampled"
    inputs = host.put(host.to_bucket(inputs, model.visual_tokens), model.plan)
    try:
        prefilled = programs.prefill_program(*config, room)(model.params, inputs)
        sample = programs.sample_program(*config, model.eos_ids, room, kind)
        out, hidden = sample(
            model.params, prefilled, np.int32(max_new_tokens), jax.random.key(seed), temperature, top_p
        )
        out, hidden = jax.device_get((out, hidden.hidden))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"{rows} rows and {max_new_tokens} new tokens do not fit into memory: ask for fewer") from error
    if not np.isfinite(hidden).all():
        raise UserError(
            f"the hidden states are not finite: weights are damaged, or {model.compute.dtype} is too narrow here"
        )
    return out[:rows, :max_new_tokens]


def _checked_sampling(temperature: Any, top_p: Any) -> tuple[np.float32, np.float32]:
    if not isinstance(temperature, numbers.Real) or not temperature >= 0:
        raise UserError(f"temperature: expected 0 (greedy) or more, got {temperature!r}")
    if not isinstance(top_p, numbers.Real) or not 0 < top_p <= 1:
        raise UserError(f"top_p: expected a probability above 0, 1 for all words, got {top_p!r}")
    # What is below the smallest normal float32 is 0 on the device: greedy.
    is_greedy = temperature < np.finfo(np.float32).tiny
    return np.float32(0 if is_greedy else temperature), np.float32(top_p)


def _new_tokens(model: Model, inputs: Inputs, asked: int | None) -> int:
    """How many there may be. Raises `UserError` for more than fit behind the longest prompt."""
    longest = int((inputs.segment != 0).sum(axis=1).max())
    most = (model.spec.decoder.context or _LONGEST) - longest
    count = whole("max_new_tokens", min(model.answer_tokens, max(most, 1)) if asked is None else asked)
    if not 1 <= count <= most:
        raise UserError(
            f"max_new_tokens: expected 1 to {most}, what this model's context leaves behind a prompt of {longest} "
            f"tokens, got {count}"
            if most > 0
            else f"a prompt of {longest} tokens fills this model's context: shorten it"
        )
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
    """Answers to prompts.

    Args:
        images: an entry for each prompt: an image (a path, a PIL image, a uint8 array of any size, or float[H, H, 3] as
            `forward` takes it), a list of images, or None; None for text alone.
        prompts: a list of texts, which the model's chat template frames if it has one, or of lists of messages. A text
            that names its images itself ("USER: <image>\\nWhat is this? ASSISTANT:") is taken as it is.

    Raises `UserError` for prompts that are longer than the model's context, or do not match the images.
    """
    tokenizer = _tokenizer(model)
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise UserError(
            "prompts: expected a list of texts, got " + ("one text" if isinstance(prompts, str) else "none")
        )
    by_row = host.images_by_row(model, images, len(prompts))
    if not prompts:
        return []
    counts = [0] * len(prompts) if by_row is None else [len(some) for some in by_row]
    rows = [
        chat.prompt_ids(model.layout, tokenizer, prompt, model.image_token, model.visual_tokens, count)
        for prompt, count in zip(prompts, counts, strict=True)
    ]
    if not all(rows):
        raise UserError(f"prompt {[bool(row) for row in rows].index(False)} is empty")
    questions = None
    if model.reads_question and any(counts):
        questions = [question_ids(model, prompt) for prompt in prompts]
    tokens, mask = host.padded(rows)
    out = generate_tokens(model, by_row, tokens, max_new_tokens, temperature, top_p, seed, mask, questions)
    return [tokenizer.decode(_until_end(row, model.eos_ids)) for row in out.tolist()]


def question_ids(model: Model, prompt: Any) -> list[int]:
    """What a compressor that reads the question is given of a prompt: its bare text behind the tokenizer's begin token,
    without a template (`chat.bare_question`). Raises `UserError` for a prompt without text.
    """
    ids = _tokenizer(model).encode(chat.bare_question(model.layout, prompt))
    if not ids:
        raise UserError("the prompt is empty")
    return ids


def question_vector(model: Model, prompt: Any) -> Float[Array, "1 D"]:
    """The vector of a prompt's question, for compressors that read it."""
    ids = np.array([question_ids(model, prompt)], np.int32)
    vlm = Vlm(model.spec, model.compute)
    return model.plan.jit(vlm.question_vector)(model.params, ids)


def _tokenizer(model: Model) -> Any:
    if model.tokenizer is None or model.layout is None:
        raise UserError("this model came without a tokenizer: load it with tokenizer=PATH, or use generate_tokens")
    return model.tokenizer


def _until_end(row: list[int], eos_ids: tuple[int, ...]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in eos_ids), len(row))]
