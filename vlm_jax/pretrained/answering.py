"""What a loaded model does: logits of given tokens, and answers to prompts.

    logits = forward(model, images, tokens)                       # the reference's input_ids -> float32[B, T, W]
    texts = generate(model, images, ["What is this?"], max_new_tokens=64)

Inputs are checked before anything runs. One program is compiled for each model, batch size and length bucket, and kept
on disk by `build.use_compilation_cache`.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL import Image

from vlm_jax.core.axes import BATCH
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import ComputeSpec, ModelSpec
from vlm_jax.data import chat
from vlm_jax.data import images as pictures
from vlm_jax.evaluation import generate as decoding
from vlm_jax.models.vlm import ANSWER, IMAGE, TEXT, Prompt, Vlm
from vlm_jax.partitioning import Plan
from vlm_jax.pretrained.loading import Model, checked_seed

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
        images: float[B, H, H, 3], the reference's `pixel_values` with channels last, or uint8 pixels; None for text
            alone.
        tokens: int[B, T], the reference's `input_ids`: V placeholders where a row's image stands.
        mask: [B, T], 0 on padding; None takes leading and trailing runs of the pad id for padding, unless that id also
            ends answers: then every token is real.
        answer: [B, T], 1 on the tokens behind a two-way prefix (PaliGemma's suffix); None: all belong to the prefix.

    Raises `UserError` for a row whose placeholders do not fit the image, or that is longer than the model's context,
    before anything runs.
    """
    prompt = _prompt(model, images, tokens, mask, answer)
    rows = prompt.tokens.shape[0]
    return _forward_program(model.spec, model.compute, model.plan)(model.params, _filled(prompt, model.plan))[:rows]


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
    checked_seed(seed)
    if not temperature >= 0:
        raise UserError(f"temperature={temperature}: 0 (greedy) or more is wanted")
    prompt = _prompt(model, images, tokens, mask, None)
    max_new_tokens = _new_tokens(model, prompt, max_new_tokens)
    rows, room = prompt.tokens.shape[0], bucket(max_new_tokens)
    kind = "greedy" if temperature == 0 else "sampled"
    program = _generate_program(model.spec, model.compute, model.plan, model.ends, room, kind)
    limit, key = np.int32(max_new_tokens), jax.random.key(seed)
    prompt = _filled(_to_bucket(prompt), model.plan)
    try:
        out = np.asarray(program(model.params, prompt, limit, key, np.float32(temperature)))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"{rows} rows and {max_new_tokens} new tokens do not fit into memory: ask for fewer") from error
    return out[:rows, :max_new_tokens]


def _new_tokens(model: Model, prompt: Prompt, wanted: int | None) -> int:
    """How many there may be. Raises `UserError` for more than fit behind the longest prompt."""
    longest = int((prompt.kind != 0).sum(axis=1).max())
    most = (model.spec.decoder.context or _LONGEST) - longest
    if wanted is None:
        wanted = min(model.answer_tokens, max(most, 1))
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
    pixels = None if images is None else _pixels(model, images)
    visual = 0 if images is None else model.visual_tokens
    rows = [chat.prompt_ids(model.layout, model.tokenizer, one, model.image_token, visual) for one in prompts]
    if not all(rows):
        raise UserError(f"prompt {[bool(row) for row in rows].index(False)} is empty")
    tokens, mask = _padded(rows)
    out = generate_tokens(model, pixels, tokens, max_new_tokens, temperature, seed, mask)
    return [model.tokenizer.decode(_until_end(row, model.ends)) for row in out.tolist()]


def question_vector(model: Model, prompt: str) -> Float[Array, "1 D"]:
    """What a compressor that reads the question is told of this prompt."""
    if model.tokenizer is None or model.layout is None:
        raise UserError("this model came without a tokenizer: load it with tokenizer=PATH")
    row = chat.prompt_ids(model.layout, model.tokenizer, prompt, model.image_token, model.visual_tokens)
    text = [token for token in row if token != model.image_token]
    if not text:
        raise UserError("the prompt is empty")
    vlm = Vlm(model.spec, model.compute)
    read = model.plan.jit(lambda params, prompt: vlm.prompt_vector(params, prompt))
    tokens, mask = _padded([row])
    kind = np.where(tokens == model.image_token, IMAGE, TEXT) * mask
    return read(model.params, _filled(Prompt(tokens, kind.astype(np.int32)), model.plan))[:1]


def _pixels(model: Model, images: Any) -> Any:
    if model.image is None:
        raise UserError("this model reads text alone: leave the images out")
    if isinstance(images, np.ndarray | jax.Array) and images.dtype != np.uint8:
        return images
    return pictures.prepare([_rgb(one) for one in images], model.image)


def _rgb(image: Any) -> UInt8[np.ndarray, "h w 3"]:
    """A path, a PIL image, or an array that is one already."""
    if isinstance(image, str | Path):
        return pictures.read_image(image)
    array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else _array("an image", image))
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise UserError(f"{array.dtype}{list(array.shape)} is no image: give a path, a PIL image or uint8[h, w, 3]")
    return array


def _padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths, padded on the right, and where they are real."""
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return tokens, mask


def _until_end(row: list[int], ends: tuple[int, ...]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


def _prompt(model: Model, images: Any, tokens: Any, mask: Any, answer: Any) -> Prompt:
    """Checked arrays, on the host."""
    tokens = _array("tokens", tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
        raise UserError(f"tokens {tokens.dtype}{list(tokens.shape)}: integers of shape [B, T] are wanted")
    # A pad id that also ends answers may be a real last token.
    pad = None if model.pad in model.ends else model.pad
    real = _real(tokens, pad) if mask is None else _array("mask", mask) != 0
    if real.shape != tokens.shape:
        raise UserError(f"mask has shape {list(real.shape)}, tokens {list(tokens.shape)}")
    here = real & (tokens == (-1 if model.image_token is None else model.image_token))
    wrong = np.flatnonzero((real & ~here & ((tokens < 0) | (tokens >= model.spec.decoder.vocab))).any(axis=1))
    if wrong.size:
        raise UserError(f"row {wrong[0]}: a token lies outside the vocabulary of {model.spec.decoder.vocab}")
    if not real.any(axis=1).all():
        raise UserError(f"row {np.flatnonzero(~real.any(axis=1))[0]} is nothing but padding")
    longest, context = int(real.sum(axis=1).max()), model.spec.decoder.context
    if context and longest > context:
        raise UserError(
            f"a prompt of {longest} tokens is longer than the {context} of this model's context: shorten it"
        )
    images = None if images is None else _array("images", images)
    _check_images(model, images, here)
    kind = np.where(here, IMAGE, np.where(real, TEXT, 0))
    if answer is not None:
        answer = _array("answer", answer)
        if answer.shape != tokens.shape:
            raise UserError(f"answer has shape {list(answer.shape)}, tokens {list(tokens.shape)}")
        kind = np.where(real & (answer != 0), ANSWER, kind)
    return Prompt(tokens.astype(np.int32), kind.astype(np.int32), images)


def _array(name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: not an array ({error})") from error
    if not jnp.issubdtype(array.dtype, jnp.number) and array.dtype != bool:
        raise UserError(f"{name}: numbers are wanted, not {array.dtype}")
    return array


def _real(tokens: np.ndarray, pad: int | None) -> np.ndarray:
    """False on leading and trailing runs of the pad id."""
    if pad is None:
        return np.ones(tokens.shape, bool)
    word = tokens != pad
    ahead, behind = (np.logical_or.accumulate(side, axis=1) for side in (word, word[:, ::-1]))
    return ahead & behind[:, ::-1]


def _check_images(model: Model, images: Any, here: Bool[np.ndarray, "B T"]) -> None:
    counts = here.sum(axis=1)
    if images is None:
        if counts.any():
            raise UserError(f"row {np.flatnonzero(counts)[0]} has image placeholders, but there are no images")
        return
    if model.spec.encoder is None:
        raise UserError("this model reads text alone: leave the images out")
    side = model.spec.encoder.image_size
    if images.shape != (len(counts), side, side, 3):
        raise UserError(f"images have shape {list(images.shape)}, {[len(counts), side, side, 3]} is wanted")
    wrong = np.flatnonzero(counts != model.visual_tokens)
    if wrong.size:
        raise UserError(
            f"row {wrong[0]} has {counts[wrong[0]]} image placeholders (id {model.image_token}), "
            f"{model.visual_tokens} are wanted: one for each visual token"
        )


def bucket(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: few programs, and at most a third of a row is padding."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _to_bucket(prompt: Prompt) -> Prompt:
    more = ((0, 0), (0, bucket(prompt.tokens.shape[1]) - prompt.tokens.shape[1]))
    return prompt._replace(tokens=np.pad(prompt.tokens, more), kind=np.pad(prompt.kind, more))


def _filled(prompt: Prompt, plan: Plan) -> Prompt:
    """Rows repeated until the batch divides over the mesh, and put there."""
    more = -prompt.tokens.shape[0] % plan.parts(BATCH)
    return plan.put(jax.tree.map(lambda leaf: np.concatenate([leaf, np.repeat(leaf[-1:], more, axis=0)]), prompt))


@functools.lru_cache(maxsize=32)
def _forward_program(spec: ModelSpec, compute: ComputeSpec, plan: Plan) -> Callable[..., Any]:
    vlm = Vlm(spec, compute)
    return plan.jit(lambda params, prompt: vlm.logits(params, vlm.read(params, prompt)[0]))


@functools.lru_cache(maxsize=32)
def _generate_program(
    spec: ModelSpec, compute: ComputeSpec, plan: Plan, ends: tuple[int, ...], room: int, kind: str
) -> Callable[..., Any]:
    vlm = Vlm(spec, compute)

    def answer(params: Any, prompt: Prompt, limit: Array, key: Array, temperature: Array) -> Array:
        pick = decoding.likeliest if kind == "greedy" else decoding.sampler(key, temperature)
        return decoding.answer(vlm, params, prompt, pick, ends, limit, room)

    return plan.jit(answer)
