"""What a loaded model does: logits of given tokens, and answers to prompts.

    logits = forward(model, images, tokens)                       # the reference's input_ids -> float32[B, T, W]
    texts = generate(model, images, ["What is this?"], max_new_tokens=64)

Inputs are checked before anything runs (`inputs`). Two programs are compiled for each model, batch size and length
bucket, one that reads and one that says; the head behind `forward` is a small third, for each length.
"""

import functools
import numbers
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import ComputeSpec, ModelSpec
from vlm_jax.data import chat
from vlm_jax.evaluation import generate as decoding
from vlm_jax.models.vlm import Prompt, Vlm
from vlm_jax.partitioning import Plan
from vlm_jax.pretrained import inputs
from vlm_jax.pretrained.loading import Model, checked_seed, whole

_LONGEST = 2**20  # tokens of a row, where a model's context is not known


def forward(
    model: Model,
    images: Any | None,
    tokens: Any,
    mask: Any | None = None,
    answer: Any | None = None,
) -> Float[Array, "B T W"]:
    """Logits of every position, float32; those of padding mean nothing.

    Args:
        images: one for each row: paths, PIL images or uint8 arrays of any size; or float[B, H, H, 3], the reference's
            `pixel_values` with channels last; None for text alone.
        tokens: int[B, T], the reference's `input_ids`: V placeholders where a row's image stands.
        mask: [B, T], 0 on padding; None takes leading and trailing runs of the pad id for padding, unless that id also
            ends answers: then every token is real.
        answer: [B, T], 1 on the tokens behind a two-way prefix (PaliGemma's suffix); None: all belong to the prefix.

    Raises `UserError` for a row whose placeholders do not fit the image, or that is longer than the model's context,
    before anything runs.
    """
    prompt = inputs.checked(model, images, tokens, mask, answer)
    (rows, length), config = prompt.tokens.shape, (model.spec, model.compute, model.plan)
    prompt = inputs.filled(inputs.to_bucket(prompt, model.visual_tokens), model.plan)
    states = _read_program(*config)(model.params, prompt)
    # Of the tokens alone: those of padding would be large in vain.
    return _logits_program(*config)(model.params, states[:, :length])[:rows]


def generate_tokens(
    model: Model,
    images: Any | None,
    tokens: Any,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    mask: Any | None = None,
) -> Int[np.ndarray, "B new"]:
    """Continuations of rows of tokens, as `forward` takes them. An end token ends its row and fills what follows.

    `max_new_tokens` None is the model's `answer_tokens`, or what its context leaves of them.
    `temperature` 0 is greedy; above, tokens are drawn with keys that follow from `seed` and the row's number.
    """
    seed = checked_seed(seed)
    if not isinstance(temperature, numbers.Real) or not temperature >= 0:
        raise UserError(f"temperature={temperature!r}: 0 (greedy) or more is wanted")
    warmth = np.float32(temperature)  # what is too little for it is greedy
    prompt = inputs.checked(model, images, tokens, mask, None)
    max_new_tokens = _new_tokens(model, prompt, max_new_tokens)
    rows, room = prompt.tokens.shape[0], inputs.bucket(max_new_tokens)
    config, kind = (model.spec, model.compute, model.plan), "greedy" if warmth == 0 else "sampled"
    prompt = inputs.filled(inputs.to_bucket(prompt, model.visual_tokens), model.plan)
    limit, key = np.int32(max_new_tokens), jax.random.key(seed)
    try:
        asked = _ask_program(*config, room)(model.params, prompt)
        say = _say_program(*config, model.ends, room, kind)
        out, asked = say(model.params, asked, limit, key, warmth)
        out, state = jax.device_get((out, asked.state))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"{rows} rows and {max_new_tokens} new tokens do not fit into memory: ask for fewer") from error
    if not np.isfinite(state).all():
        raise UserError(f"the states are not numbers: weights are damaged, or {model.compute.dtype} is too narrow here")
    return out[:rows, :max_new_tokens]


def _new_tokens(model: Model, prompt: Prompt, wanted: int | None) -> int:
    """How many there may be. Raises `UserError` for more than fit behind the longest prompt."""
    longest = int((prompt.kind != 0).sum(axis=1).max())
    most = (model.spec.decoder.context or _LONGEST) - longest
    if wanted is None:
        wanted = min(model.answer_tokens, max(most, 1))
    wanted = whole("max_new_tokens", wanted)
    if not 1 <= wanted <= most:
        raise UserError(
            f"max_new_tokens={wanted}: behind a prompt of {longest} tokens, 1 to {most} fit into this model's context"
            if most > 0
            else f"a prompt of {longest} tokens fills this model's context: shorten it"
        )
    return wanted


def generate(
    model: Model,
    images: Any | None,
    prompts: Any,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Answers to prompts.

    Args:
        images: one for each prompt: paths, PIL images or uint8 arrays of any size, or float[B, H, W, 3] as `forward`
            takes them; None for text alone.
        prompts: a list of texts, which the model's chat template frames if it has one, or of lists of messages. A text
            that names the image itself ("USER: <image>\\nWhat is this? ASSISTANT:") is taken as it is.

    Raises `UserError` for prompts that are longer than the model's context, or do not match the images.
    """
    if model.tokenizer is None or model.layout is None:
        raise UserError("this model came without a tokenizer: load it with tokenizer=PATH, or use generate_tokens")
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise UserError("prompts is one text, or no list: give a list of texts")
    if isinstance(images, str | Path) or not (images is None or hasattr(images, "__len__")):
        raise UserError("images is one image, or no list: give a list with one for each prompt")
    if images is not None and len(images) != len(prompts):
        raise UserError(f"{len(images)} images for {len(prompts)} prompts: one for each is wanted")
    if not prompts:
        return []
    visual = 0 if images is None else model.visual_tokens
    rows = [chat.prompt_ids(model.layout, model.tokenizer, one, model.image_token, visual) for one in prompts]
    if not all(rows):
        raise UserError(f"prompt {[bool(row) for row in rows].index(False)} is empty")
    tokens, mask = inputs.padded(rows)
    out = generate_tokens(model, images, tokens, max_new_tokens, temperature, seed, mask)
    return [model.tokenizer.decode(_until_end(row, model.ends)) for row in out.tolist()]


def question_vector(model: Model, prompt: str) -> Float[Array, "1 D"]:
    """What a compressor that reads the question is told of this prompt."""
    if model.tokenizer is None or model.layout is None:
        raise UserError("this model came without a tokenizer: load it with tokenizer=PATH")
    row = chat.prompt_ids(model.layout, model.tokenizer, prompt, model.image_token, model.visual_tokens)
    text = [token for token in row if token != model.image_token]
    if not text:
        raise UserError("the prompt is empty")
    prompt = inputs.checked(model, None, *inputs.padded([text]), None)
    vlm = Vlm(model.spec, model.compute)
    return model.plan.jit(vlm.prompt_vector)(model.params, inputs.filled(prompt, model.plan))[:1]


def _until_end(row: list[int], ends: tuple[int, ...]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


@functools.lru_cache(maxsize=32)
def _read_program(spec: ModelSpec, compute: ComputeSpec, plan: Plan) -> Callable[..., Any]:
    vlm = Vlm(spec, compute)
    return plan.jit(lambda params, prompt: vlm.read(params, prompt)[0], compiler_options=tall_products())


@functools.lru_cache(maxsize=32)
def _logits_program(spec: ModelSpec, compute: ComputeSpec, plan: Plan) -> Callable[..., Any]:
    return plan.jit(Vlm(spec, compute).logits)


@functools.lru_cache(maxsize=32)
def _ask_program(spec: ModelSpec, compute: ComputeSpec, plan: Plan, room: int) -> Callable[..., Any]:
    vlm = Vlm(spec, compute)
    return plan.jit(lambda params, prompt: decoding.ask(vlm, params, prompt, room), compiler_options=tall_products())


@functools.lru_cache(maxsize=32)
def _say_program(
    spec: ModelSpec, compute: ComputeSpec, plan: Plan, ends: tuple[int, ...], room: int, kind: str
) -> Callable[..., Any]:
    vlm = Vlm(spec, compute)

    def say(params: Any, asked: decoding.Asked, limit: Array, key: Array, temperature: Array) -> tuple[Array, Any]:
        pick = decoding.likeliest if kind == "greedy" else decoding.sampler(key, temperature)
        return decoding.answer(vlm, params, asked, pick, ends, limit, room)

    return plan.jit(say, donate_argnums=1)


@functools.cache
def tall_products() -> dict[str, str]:
    """Compiler options of a program that reads whole texts. On CPUs XLA gives every product to YNNPACK by default,
    which is right for the few rows and the transposed table of a token that is said; for many rows its older way is
    quicker (experiments/inference_speed).
    """
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:  # another version's compiler, without this option
        return {}
    return options
