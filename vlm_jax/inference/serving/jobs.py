"""A request on its way through the server: prepared on the host, decoded in a batch, answered."""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vlm_jax.core.errors import UserError
from vlm_jax.data import images as pictures
from vlm_jax.inference import api, decoding
from vlm_jax.inference import prompts as host
from vlm_jax.inference.loading import Model
from vlm_jax.inference.serving.answers import Completion, answer_of
from vlm_jax.inference.serving.requests import ChatRequest, RequestError, ServingSpec, prompt_of

_LEAST = 64  # padded length of prompts and of answers


class Prompt(NamedTuple):
    """A request as a row of a batch."""

    tokens: list[int]
    images: list[np.ndarray]  # prepared for the encoder
    question: list[int] | None  # of a question-dependent compressor
    limit: int  # number of new tokens


class Shape(NamedTuple):
    """What decides whether rows share a program."""

    images: int
    text_tokens: int
    max_new: int

    def fits(self, other: "Shape") -> bool:
        """Whether a row of this shape can be padded to `other`."""
        return self.images == other.images and self.text_tokens <= other.text_tokens and self.max_new <= other.max_new


def prepare(model: Model, request: ChatRequest, spec: ServingSpec) -> Prompt:
    """Decodes images and tokenizes the prompt as `generate` does. Raises `RequestError` (400, 413)."""
    if (request.max_tokens or 0) > spec.max_tokens:
        message = f"max_tokens: expected at most {spec.max_tokens}, got {request.max_tokens}"
        raise RequestError(400, message, "max_tokens")
    _check_pixels(request.images, spec.max_pixels)
    try:
        prompt = prompt_of(request, model.chat_format is not None and model.chat_format.kind == "template")
        rows = api.prompt_rows(model, [request.images] if request.images else None, [prompt])
        tokens, mask = host.padded(rows.tokens)
        inputs = host.inputs_of(model, rows.images, tokens, mask, None, rows.questions)
        limit = decoding.new_tokens(model, inputs, request.max_tokens, "max_tokens")
    except UserError as error:
        raise RequestError(400, str(error)) from error
    images, question = rows.images[0] if rows.images else [], rows.questions[0] if rows.questions else None
    return Prompt(rows.tokens[0], images, question, min(limit, spec.max_tokens))


def example_prompt(model: Model, spec: ServingSpec) -> Prompt:
    """A short question, about an image if the model has an encoder."""
    images = [] if model.spec.encoder is None else [np.zeros((8, 8, 3), np.uint8)]
    limit = min(model.answer_tokens, spec.max_tokens)
    try:
        rows = api.prompt_rows(model, [images], ["What is this?"]) if images else api.prompt_rows(model, None, ["Hi"])
        tokens, questions = rows.tokens[0], rows.questions
    except UserError:  # words that its tokenizer does not have
        tokens, questions = [model.image_token or 0] * (model.visual_tokens * len(images)) + [0], [[0]]
    by_row = host.images_by_row(model, [images], 1) if images else None
    return Prompt(
        tokens, by_row[0] if by_row else [], questions[0] if questions and model.reads_question else None, limit
    )


def _check_pixels(images: list[bytes], limit: int) -> None:
    """Raises `RequestError` by the sizes in the files' headers, before they are decoded."""
    total = sum(map(pictures.count_pixels, images))
    if total > limit:
        message = f"images: expected at most {limit:,} pixels in all, got {total:,} (scale them down)"
        raise RequestError(413, message, "messages")


def shape_of(model: Model, prompt: Prompt) -> Shape:
    """Prompts of 64, 128, 256, ... tokens, answers of 64, 256, 1024, ...: a program for each shape and batch size."""
    visual = model.visual_tokens
    images = len(prompt.images) if visual else 0
    text, new = max(len(prompt.tokens) - images * visual, _LEAST), max(prompt.limit, _LEAST)
    return Shape(images, 1 << (text - 1).bit_length(), 4 ** -(-(new - 1).bit_length() // 2))


class Job:
    """A prepared request, and where its answer goes. `publish` is called in the thread of the batches."""

    def __init__(
        self, model: Model, request: ChatRequest, prompt: Prompt, publish: Callable[[Completion | RequestError], None]
    ):
        self.request, self.prompt, self.shape = request, prompt, shape_of(model, prompt)
        self.arrived = time.monotonic()
        self.answer = Completion("", 0)
        self._publish, self._cancelled = publish, threading.Event()

    def cancel(self) -> None:
        """Without a reader, a waiting job is dropped and a running one ends early."""
        self._cancelled.set()

    @property
    def is_done(self) -> bool:
        return self._cancelled.is_set() or self.answer.finish_reason is not None

    def update(self, model: Model, tokens: list[int]) -> None:
        """Takes the row's tokens so far; publishes a finished answer, and in a stream each new part."""
        assert model.tokenizer is not None
        request, before = self.request, self.answer
        self.answer = answer_of(
            tokens, model.tokenizer.decode, model.eos_ids, request.stop, self.prompt.limit, before.tokens
        )
        if self.answer.finish_reason is not None or request.stream:
            self._publish(self.answer)

    def fail(self, error: RequestError) -> None:
        self._publish(error)
