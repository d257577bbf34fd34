"""Batches of requests: one thread takes those that arrive within a short window and decodes them together.

    engine = Engine(model, spec)
    engine.start()
    engine.submit(job)          # any thread; `job` publishes its answer
    engine.close()              # waiting jobs fail with 503, the running batch finishes
    engine.join()

A batch has one shape (number of images, padded length, padded answer). Its rows have their own sampling parameters and
limits, and do not affect each other.
"""

import itertools
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from vlm_jax.core.errors import UserError
from vlm_jax.inference import decoding
from vlm_jax.inference import prompts as host
from vlm_jax.inference.loading import Model
from vlm_jax.inference.sampling import SamplingParams
from vlm_jax.inference.serving.jobs import Job, Prompt, Shape, example_prompt, shape_of
from vlm_jax.inference.serving.requests import RequestError, ServingSpec

_STEPS = 8  # decode steps between looks at the tokens: streams, stop texts, cancelled requests


class _Sampling(NamedTuple):
    limit: int
    temperature: float
    top_p: float
    seed: int


class Engine:
    """The queue and its thread."""

    def __init__(self, model: Model, spec: ServingSpec):
        self.model, self.spec = model, spec
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="batches", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Raises `RequestError` (503) when closing."""
        with self._changed:
            if self._closing:
                raise closing_error()
            self._waiting.append(job)
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Number of requests that are not decoded yet."""
        return len(self._waiting)

    @property
    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Waiting jobs fail; the running batch finishes."""
        with self._changed:
            self._closing = True
            waiting, self._waiting = self._waiting, []
            self._changed.notify()
        for job in waiting:
            job.fail(closing_error())

    def join(self) -> None:
        self._thread.join()

    def warm_up(self, on_compiled: Callable[[int, float], None]) -> None:
        """Compiles the programs of a short question for all batch sizes, before `start`. `on_compiled` gets each size
        and its seconds.
        """
        prompt = example_prompt(self.model, self.spec)
        shape = shape_of(self.model, prompt)
        for size in sizes(self.spec.max_batch):
            started = time.monotonic()
            state, params = self._start([prompt], [_Sampling(2, 0.0, 1.0, 0)], shape, size)
            jax.block_until_ready(decoding.advance(self.model, state, params, 2))
            on_compiled(size, time.monotonic() - started)

    def _loop(self) -> None:
        while batch := self._next_batch():
            self._run(batch)

    def _next_batch(self) -> list[Job]:
        """The oldest job with those of its shape, then smaller ones; [] when closing."""
        with self._changed:
            while True:
                self._waiting = [job for job in self._waiting if not job.is_done]
                if self._waiting:
                    oldest = self._waiting[0]
                    fitting = [job for job in self._waiting if job.shape.fits(oldest.shape)]
                    fitting.sort(key=lambda job: job.shape != oldest.shape)
                    remaining = oldest.arrived + self.spec.window_secs - time.monotonic()
                    if remaining <= 0 or len(fitting) >= self.spec.max_batch:
                        batch = fitting[: _rows_to_take(len(fitting), self.spec.max_batch)]
                        self._waiting = [job for job in self._waiting if job not in batch]
                        return batch
                    self._changed.wait(remaining)
                elif self._closing:
                    return []
                else:
                    self._changed.wait()

    def _run(self, batch: list[Job]) -> None:
        """Decodes a batch. One that does not fit into memory is halved. No error leaves a job without an answer."""
        try:
            self._decode(batch)
        except UserError as error:
            if len(batch) > 1 and not any(job.answer.tokens for job in batch):
                self._run(batch[: len(batch) // 2])
                self._run(batch[len(batch) // 2 :])
            else:
                self._fail(batch, str(error))
        except Exception as error:  # the server goes on
            log_bug(f"a batch of {len(batch)}", error)
            self._fail(batch, f"{type(error).__name__} while decoding")

    def _fail(self, batch: list[Job], message: str) -> None:
        for job in batch:
            if not job.is_done:
                job.fail(RequestError(500, message))

    def _decode(self, batch: list[Job]) -> None:
        model, shape = self.model, Shape(*map(max, *(job.shape for job in batch), batch[0].shape))
        size = next(size for size in sizes(self.spec.max_batch) if size >= len(batch))
        sampling = [_Sampling(job.prompt.limit, job.request.temperature, job.request.top_p, job.request.seed)
                    for job in batch]  # fmt: skip
        with decoding.memory_errors(len(batch), shape.max_new):
            state, params = self._start([job.prompt for job in batch], sampling, shape, size)
            while True:
                out, count = jax.device_get((state.out, state.count))
                for row, job in enumerate(batch):
                    if not job.is_done:
                        job.update(model, out[row, : min(count, job.prompt.limit)].tolist())
                    if job.is_done:
                        params.limit[row] = 0
                if all(job.is_done for job in batch):
                    return
                state = decoding.advance(model, state, params, min(int(count) + _STEPS, shape.max_new))

    def _start(
        self, prompts: Sequence[Prompt], sampling: Sequence[_Sampling], shape: Shape, size: int
    ) -> tuple[decoding.Decoding, SamplingParams]:
        """The state after the first token of `size` rows: those of the prompts, then copies of the last."""
        model, extra = self.model, size - len(prompts)
        prompts = [*prompts, *[prompts[-1]] * extra]
        columns = zip(*sampling, *[sampling[-1]._replace(limit=0)] * extra, strict=True)
        dtypes = (np.int32, np.float32, np.float32, np.uint32)
        params = SamplingParams(
            *(np.array(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)), np.zeros(size, np.int32)
        )
        params.temperature[params.temperature < np.finfo(np.float32).tiny] = 0
        tokens, mask = host.padded([prompt.tokens for prompt in prompts])
        length = shape.images * model.visual_tokens + shape.text_tokens
        tokens, mask = (np.pad(part, ((0, 0), (0, length - part.shape[1]))) for part in (tokens, mask))
        images = [prompt.images for prompt in prompts] if any(prompt.images for prompt in prompts) else None
        questions = None if prompts[0].question is None else [prompt.question or [] for prompt in prompts]
        inputs = host.inputs_of(model, images, tokens, mask, None, questions)
        state, hidden = decoding.start(model, inputs, params, shape.max_new)
        decoding.check_finite(model, jax.device_get(hidden))
        return state, params


def sizes(max_batch: int) -> list[int]:
    """Batch sizes 1, 4, 16, ... up to `max_batch`: every one is a program."""
    return [*itertools.takewhile(lambda size: size < max_batch, (4**n for n in itertools.count())), max_batch]


def _rows_to_take(waiting: int, max_batch: int) -> int:
    """All waiting rows if they fill more than half of the next batch size, else those of the size below it."""
    if waiting >= max_batch:
        return max_batch
    larger = next(size for size in sizes(max_batch) if size >= waiting)
    smaller = max((size for size in sizes(max_batch) if size <= waiting), default=1)
    return waiting if 2 * waiting >= larger else smaller


def log_bug(what: str, error: Exception) -> None:
    """One line on stderr: where an unexpected error was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = f"{type(error).__name__} in {frame.filename}:{frame.lineno}: {' '.join(str(error).split()):.300}"
    print(f"error: {what}: {message}", file=sys.stderr, flush=True)


def closing_error() -> RequestError:
    return RequestError(503, "the server is shutting down")
