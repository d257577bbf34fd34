"""What `forward` and `generate` are given: checked on the host, and laid out as programs take it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from vlm_jax.core.axes import BATCH
from vlm_jax.core.errors import UserError
from vlm_jax.data import images as pictures
from vlm_jax.models.vlm import ANSWER, IMAGE, TEXT, Prompt
from vlm_jax.partitioning import Plan
from vlm_jax.pretrained.loading import Model


def pixels(model: Model, images: Any) -> Any:
    """Images of any kind as the model takes them: uint8[B, H, H, 3]. An array of floats is normalised already, and
    stays as it is.

    Raises `UserError` for arrays that are neither uint8 nor floating, and what `data.images.read_image` refuses.
    """
    encoder = model.spec.encoder
    if encoder is None:
        raise UserError("this model reads text alone: leave the images out")
    several = isinstance(images, list | tuple)
    if _floating(images) or (several and images and all(map(_floating, images))):
        return images
    if not several and not (isinstance(images, np.ndarray | jax.Array) and images.ndim):
        raise UserError(f"images: expected a list of images or an array, got {type(images).__name__}")
    return pictures.fit([pictures.read_image(one, f"image {i}") for i, one in enumerate(images)], encoder)


def _floating(images: Any) -> bool:
    return isinstance(images, np.ndarray | jax.Array) and jnp.issubdtype(images.dtype, jnp.floating)


def padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths, padded on the right, and where they are real."""
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return tokens, mask


def checked(model: Model, images: Any, tokens: Any, mask: Any, answer: Any) -> Prompt:
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
    images = None if images is None else _array("images", pixels(model, images))
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
    side = model.spec.encoder.image_size
    if images.shape != (len(counts), side, side, 3):
        raise UserError(f"images have shape {list(images.shape)}, {[len(counts), side, side, 3]} is wanted")
    if images.dtype != np.uint8 and not np.isfinite(images.astype(np.float32)).all():
        raise UserError("images: there are pixels that are no numbers")
    wrong = np.flatnonzero(counts != model.visual_tokens)
    if wrong.size:
        raise UserError(
            f"row {wrong[0]} has {counts[wrong[0]]} image placeholders (id {model.image_token}), "
            f"{model.visual_tokens} are wanted: one for each visual token"
        )


def bucket(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: few programs, and from 16 on less than a third of a row is padding."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def to_bucket(prompt: Prompt, visual_tokens: int) -> Prompt:
    """Padded on the right until the text is of a bucket's length; the image's tokens are as many in every prompt."""
    length = prompt.tokens.shape[1]
    beside = 0 if prompt.image is None else visual_tokens
    more = ((0, 0), (0, beside + bucket(length - beside) - length))
    return prompt._replace(tokens=np.pad(prompt.tokens, more), kind=np.pad(prompt.kind, more))


def filled(prompt: Prompt, plan: Plan) -> Prompt:
    """Rows repeated until the batch divides over the mesh, and put there."""
    more = -prompt.tokens.shape[0] % plan.parts(BATCH)
    return plan.put(jax.tree.map(lambda leaf: np.concatenate([leaf, np.repeat(leaf[-1:], more, axis=0)]), prompt))
