"""Inputs of `forward` and `generate`: checked on the host and converted to `Inputs`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from vlm_jax.compress import catalog
from vlm_jax.core.axes import BATCH
from vlm_jax.core.errors import UserError
from vlm_jax.core.structs import Inputs, Views
from vlm_jax.data import images as pictures
from vlm_jax.data.rows import bucket
from vlm_jax.distributed.partitioning import Plan
from vlm_jax.inference.loading import Model

Ids = Sequence[int] | Int[np.ndarray, "_"]  # of a row


def images_by_row(model: Model, images: Any, rows: int) -> list[list[np.ndarray]] | None:
    """The prepared images of each row, uint8 or float [H, H, 3]; None for text only.

    `images` is an array [B, H, W, 3] or [B, M, H, W, 3], or a list with an entry for each row: an image, a list of
    images, or None. An image is a path, a PIL image, a uint8 array of any size, or a normalised float array [H, H, 3].
    """
    if images is None:
        return None
    if model.spec.encoder is None:
        raise UserError("images: expected None for a text-only model (leave the images out)")
    is_array = isinstance(images, np.ndarray | jax.Array)
    if isinstance(images, str | Path | bytes) or not hasattr(images, "__len__") or (is_array and images.ndim == 3):
        raise UserError("images: expected a list with one entry for each row, got one image")
    if len(images) != rows:
        raise UserError(f"images: expected one entry for each of {rows} rows, got {len(images)}")
    if is_array:
        images = np.asarray(images)
        if images.ndim not in (4, 5):
            raise UserError(f"images: expected [B, H, W, 3] or [B, M, H, W, 3], got shape {list(images.shape)}")
        images = list(images if images.ndim == 5 else images[:, None])
    return [
        [prepare_image(model, image, f"images[{row}]") for image in _as_list(entry)] for row, entry in enumerate(images)
    ]


def _as_list(entry: Any) -> list[Any]:
    if entry is None:
        return []
    is_array = isinstance(entry, np.ndarray | jax.Array)
    return list(entry) if isinstance(entry, list | tuple) or (is_array and entry.ndim == 4) else [entry]


def prepare_image(model: Model, image: Any, name: str) -> np.ndarray:
    """An image (see `images_by_row`) as uint8 or float [H, H, 3]. Errors call it `name`."""
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
    return pictures.read_and_fit(image, model.spec.encoder, name)


def padded(rows: Sequence[Ids], fill: int = 0) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Rows of different lengths padded on the right, and their mask."""
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
    """`Inputs` of one conversation a row, on the host. Raises `UserError` for invalid rows.

    Args:
        tokens, mask, answer: as in `api.forward`.
        questions: token ids of each row's question, for question-dependent compressors; None: all text of the row.
    """
    tokens = array_of("tokens", tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
        raise UserError(f"tokens: expected integers of shape [B, T], got {tokens.dtype}{list(tokens.shape)}")
    pad = None if model.pad in model.eos_ids else model.pad
    valid = _find_valid(tokens, pad) if mask is None else _as_mask("mask", mask, tokens.shape)
    answers = np.zeros(tokens.shape, bool) if answer is None else _as_mask("answer", answer, tokens.shape)
    is_image = valid & (tokens == (-1 if model.image_token is None else model.image_token))
    vocab = model.spec.decoder.vocab
    outside = np.argwhere(valid & ~is_image & ((tokens < 0) | (tokens >= vocab)))
    if outside.size:
        row, column = outside[0].tolist()
        raise UserError(
            f"row {row}: expected ids below the vocabulary of {vocab}, got {tokens[row, column]} (a token without an "
            "embedding)"
        )
    if not valid.any(axis=1).all():
        raise UserError(f"row {np.flatnonzero(~valid.any(axis=1))[0]}: expected a token, got padding alone")
    longest, context = int(valid.sum(axis=1).max()), model.spec.decoder.context
    if context and longest > context:
        raise UserError(f"a prompt of {longest} tokens is longer than the model's context of {context}: shorten it")
    _check_placeholders(model, images, is_image)
    position = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
    order = position if model.spec.mask == "causal" else np.where(answers, position, 0)
    visual = np.where(is_image, np.cumsum(is_image, axis=1) - 1, -1)
    inputs = Inputs(*(part.astype(np.int32) for part in (tokens, valid, position, order, visual)))
    if not is_image.any():
        return inputs
    if questions is None:
        questions = [row[keep].tolist() for row, keep in zip(tokens, valid & ~is_image, strict=True)]
    return inputs._replace(views=_views(model, images or [], questions))


def _views(model: Model, images: list[list[np.ndarray]], questions: Sequence[Sequence[int]]) -> Views:
    """The images of all rows, padded with zeros to the same number."""
    count, side = max(map(len, images)), model.spec.encoder.image_size
    dtypes = {image.dtype for row in images for image in row}
    dtype = np.uint8 if dtypes == {np.dtype(np.uint8)} else np.float32
    pixels = np.zeros((len(images), count, side, side, 3), dtype)
    for i, row in enumerate(images):
        for j, image in enumerate(row):
            to_normalise = image.dtype == np.uint8 and dtype != np.uint8
            pixels[i, j] = pictures.normalise(image, model.spec.encoder) if to_normalise else image
    if not model.reads_question:
        return Views(pixels)
    if not all(questions):
        raise UserError(f"row {[bool(q) for q in questions].index(False)}: expected a question, got no text")
    ids, _ = padded(questions, -1)
    ids = np.pad(ids, ((0, 0), (0, bucket(ids.shape[1]) - ids.shape[1])), constant_values=-1)
    return Views(pixels, question=np.repeat(ids[:, None], count, axis=1))


def array_of(name: str, value: Any) -> np.ndarray:
    """A numeric or boolean array. Raises `UserError` for anything else."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: expected an array, got {type(value).__name__} ({error})") from error
    if not jnp.issubdtype(array.dtype, jnp.number) and array.dtype != bool:
        raise UserError(f"{name}: expected numbers, got {array.dtype}")
    return array


def _as_mask(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    mask = array_of(name, value) != 0
    if mask.shape != shape:
        raise UserError(f"{name}: expected the shape of tokens, {list(shape)}, got {list(mask.shape)}")
    return mask


def _find_valid(tokens: np.ndarray, pad: int | None) -> np.ndarray:
    """False on leading and trailing runs of the pad id."""
    if pad is None:
        return np.ones(tokens.shape, bool)
    not_pad = tokens != pad
    after_first, before_last = (np.logical_or.accumulate(x, axis=1) for x in (not_pad, not_pad[:, ::-1]))
    return after_first & before_last[:, ::-1]


def _check_placeholders(model: Model, images: list[list[np.ndarray]] | None, is_image: Bool[np.ndarray, "B T"]) -> None:
    visual = model.visual_tokens
    for row, count in enumerate(is_image.sum(axis=1).tolist()):
        expected = 0 if images is None else len(images[row]) * visual
        if count != expected:
            given = "no images" if images is None else f"{len(images[row])} images of {visual} visual tokens"
            raise UserError(
                f"row {row}: expected {expected} image placeholders (id {model.image_token}) for {given}, got {count}"
            )


def to_bucket(inputs: Inputs, model: Model) -> Inputs:
    """Pads rows on the right until their text, without visual tokens, has the length of a bucket. Where visual tokens
    leave the decoder or its cache, a row also has padding in place of the views that it lacks."""
    length = inputs.tokens.shape[1]
    visual = 0 if inputs.views is None else inputs.views.pixels.shape[1] * model.visual_tokens
    if visual and (catalog.stages(model.spec) or catalog.hides_tokens(model.spec)):
        lacking = visual - (inputs.visual >= 0).sum(axis=1) - (inputs.segment == 0).sum(axis=1)
        length += max(int(lacking.max()), 0)
    padding = ((0, 0), (0, max(visual + bucket(max(length - visual, 1)), length) - inputs.tokens.shape[1]))
    arrays = (np.pad(part, padding) for part in inputs[:4])
    return Inputs(*arrays, np.pad(inputs.visual, padding, constant_values=-1), inputs.views)


def put(rows: Any, plan: Plan) -> Any:
    """Global arrays of a tree of rows; the last row is repeated until the batch divides over the mesh."""

    def pad(leaf: np.ndarray) -> np.ndarray:
        extra = -len(leaf) % plan.axis_size(BATCH)
        return np.concatenate([leaf, np.repeat(leaf[-1:], extra, axis=0)])

    return plan.put(jax.tree.map(pad, rows))
