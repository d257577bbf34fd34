"""What `forward` and `generate` are given: checked on the host, and laid out as `Inputs`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from vlm_jax.core.axes import BATCH
from vlm_jax.core.errors import UserError
from vlm_jax.core.structs import Inputs, Views
from vlm_jax.data import images as pictures
from vlm_jax.distributed.partitioning import Plan
from vlm_jax.inference.loading import Model


def images_by_row(model: Model, images: Any, rows: int) -> list[list[np.ndarray]] | None:
    """The images of each row, prepared: uint8 or float [H, H, 3] each; None for text alone.

    `images` is an array of one image a row [B, H, W, 3] or of M images a row [B, M, H, W, 3], or a list with an entry a
    row: an image, several in a list, or None. An image is a path, a PIL image or a uint8 array of any size, or a float
    array [H, H, 3] that is normalised as the encoder was trained.
    """
    if images is None:
        return None
    if model.spec.encoder is None:
        raise UserError("this model reads text alone: leave the images out")
    if isinstance(images, str | Path) or not hasattr(images, "__len__"):
        raise UserError("images: expected a list with one entry for each row, got one image")
    if len(images) != rows:
        raise UserError(f"images: expected one entry for each of {rows} rows, got {len(images)}")
    if isinstance(images, np.ndarray | jax.Array):
        images = np.asarray(images)
        if images.ndim not in (4, 5):
            raise UserError(f"images: expected [B, H, W, 3] or [B, M, H, W, 3], got shape {list(images.shape)}")
        images = list(images if images.ndim == 5 else images[:, None])
    return [[_prepared(model, one, f"images[{row}]") for one in _several(entry)] for row, entry in enumerate(images)]


def _several(entry: Any) -> list[Any]:
    if entry is None:
        return []
    is_array = isinstance(entry, np.ndarray | jax.Array)
    return list(entry) if isinstance(entry, list | tuple) or (is_array and entry.ndim == 4) else [entry]


def _prepared(model: Model, image: Any, name: str) -> np.ndarray:
    side = model.spec.encoder.image_size
    if isinstance(image, np.ndarray | jax.Array) and jnp.issubdtype(image.dtype, jnp.floating):
        image = np.asarray(image, np.float32)
        if image.shape != (side, side, 3):
            raise UserError(
                f"{name}: expected normalised pixels of shape {[side, side, 3]}, got {list(image.shape)}: give a path, "
                "a PIL image or a uint8 array for images of other sizes"
            )
        if not np.isfinite(image).all():
            raise UserError(f"{name}: expected finite pixels, got inf or nan")
        return image
    return pictures.fit([pictures.read_image(image, name)], model.spec.encoder)[0]


def padded(rows: Sequence[Sequence[int]], fill: int = 0) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Rows of different lengths, padded on the right, and where they are real."""
    tokens = np.full((len(rows), max(map(len, rows))), fill, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return tokens, mask


def inputs_of(
    model: Model,
    images: list[list[np.ndarray]] | None,
    tokens: Any,
    mask: Any = None,
    answer: Any = None,
    questions: Sequence[Sequence[int]] | None = None,
) -> Inputs:
    """Checked rows of one conversation each, on the host.

    Args:
        tokens, mask, answer: as `api.forward` takes them.
        questions: ids of what each row asks, for compressors that read the question; None: the row's own text.
    """
    tokens = array_of("tokens", tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
        raise UserError(f"tokens: expected integers of shape [B, T], got {tokens.dtype}{list(tokens.shape)}")
    # A pad id that also ends answers may be a real last token.
    pad = None if model.pad in model.eos_ids else model.pad
    real = _real(tokens, pad) if mask is None else array_of("mask", mask) != 0
    if real.shape != tokens.shape:
        raise UserError(f"mask: expected the shape of tokens, {list(tokens.shape)}, got {list(real.shape)}")
    here = real & (tokens == (-1 if model.image_token is None else model.image_token))
    wrong = np.flatnonzero((real & ~here & ((tokens < 0) | (tokens >= model.spec.decoder.vocab))).any(axis=1))
    if wrong.size:
        raise UserError(f"row {wrong[0]}: expected ids below the vocabulary of {model.spec.decoder.vocab}, got another")
    if not real.any(axis=1).all():
        raise UserError(f"row {np.flatnonzero(~real.any(axis=1))[0]}: expected a token, got padding alone")
    longest, context = int(real.sum(axis=1).max()), model.spec.decoder.context
    if context and longest > context:
        raise UserError(
            f"a prompt of {longest} tokens is longer than the {context} of this model's context: shorten it"
        )
    _check_placeholders(model, images, here)
    answers = np.zeros(tokens.shape, bool)
    if answer is not None:
        answers = array_of("answer", answer) != 0
        if answers.shape != tokens.shape:
            raise UserError(f"answer: expected the shape of tokens, {list(tokens.shape)}, got {list(answers.shape)}")
    position = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    order = position if model.spec.mask == "causal" else np.where(answers, position, 0)
    visual = np.where(here, np.cumsum(here, axis=1) - 1, -1)
    inputs = Inputs(*(part.astype(np.int32) for part in (tokens, real, position, order, visual)))
    if not here.any():
        return inputs
    if questions is None:
        questions = [row[keep].tolist() for row, keep in zip(tokens, real & ~here, strict=True)]
    return inputs._replace(views=_views(model, images or [], questions))


def _views(model: Model, images: list[list[np.ndarray]], questions: Sequence[Sequence[int]]) -> Views:
    """As many views in every row as the row with the most images has; what is missing is black."""
    count, side = max(map(len, images)), model.spec.encoder.image_size
    kinds = {image.dtype for row in images for image in row}
    dtype = np.uint8 if kinds == {np.dtype(np.uint8)} else np.float32
    pixels = np.zeros((len(images), count, side, side, 3), dtype)
    for row, some in zip(pixels, images, strict=True):
        for slot, image in zip(row, some, strict=False):
            is_raw = image.dtype == np.uint8 and dtype != np.uint8
            slot[...] = pictures.normalise(image, model.spec.encoder) if is_raw else image
    if not model.reads_question:
        return Views(pixels)
    if not all(questions):
        raise UserError(f"row {[bool(q) for q in questions].index(False)}: expected a question, got no text")
    ids, _ = padded(questions, -1)
    ids = np.pad(ids, ((0, 0), (0, bucket(ids.shape[1]) - ids.shape[1])), constant_values=-1)
    return Views(pixels, question=np.repeat(ids[:, None], count, axis=1))


def array_of(name: str, value: Any) -> np.ndarray:
    """An array of numbers. Raises `UserError` for anything else."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: expected an array, got {type(value).__name__} ({error})") from error
    if not jnp.issubdtype(array.dtype, jnp.number) and array.dtype != bool:
        raise UserError(f"{name}: expected numbers, got {array.dtype}")
    return array


def _real(tokens: np.ndarray, pad: int | None) -> np.ndarray:
    """False on leading and trailing runs of the pad id."""
    if pad is None:
        return np.ones(tokens.shape, bool)
    word = tokens != pad
    ahead, behind = (np.logical_or.accumulate(side, axis=1) for side in (word, word[:, ::-1]))
    return ahead & behind[:, ::-1]


def _check_placeholders(model: Model, images: list[list[np.ndarray]] | None, here: Bool[np.ndarray, "B T"]) -> None:
    counts, visual = here.sum(axis=1), model.visual_tokens
    expected = [0 if images is None else len(images[row]) * visual for row in range(len(counts))]
    for row, (count, wanted) in enumerate(zip(counts.tolist(), expected, strict=True)):
        if count != wanted:
            many = "no images" if images is None else f"{len(images[row])} images of {visual} visual tokens"
            raise UserError(
                f"row {row}: expected {wanted} image placeholders (id {model.image_token}) for {many}, got {count}"
            )


def bucket(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: few programs, and from 16 on less than a third of a row is padding."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def to_bucket(inputs: Inputs, visual_tokens: int) -> Inputs:
    """Padded on the right until the text is of a bucket's length; visual tokens are as many in every prompt."""
    length = inputs.tokens.shape[1]
    beside = 0 if inputs.views is None else inputs.views.pixels.shape[1] * visual_tokens
    more = ((0, 0), (0, max(beside + bucket(max(length - beside, 1)) - length, 0)))
    arrays = (np.pad(part, more) for part in inputs[:4])
    return Inputs(*arrays, np.pad(inputs.visual, more, constant_values=-1), inputs.views)


def put(inputs: Inputs, plan: Plan) -> Inputs:
    """Rows repeated until the batch divides over the mesh, and put there."""
    more = -inputs.tokens.shape[0] % plan.axis_size(BATCH)
    return plan.put(jax.tree.map(lambda leaf: np.concatenate([leaf, np.repeat(leaf[-1:], more, axis=0)]), inputs))
