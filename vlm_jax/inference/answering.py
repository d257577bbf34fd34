"""A loaded model's answers to the items of a benchmark, and its fields of their result rows.

Items are asked in batches of similar length. While the device generates one, threads decode the images of the next two
and write the answers of the one before.
"""

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from vlm_jax import __version__
from vlm_jax.checkpoints import orbax
from vlm_jax.compress import catalog
from vlm_jax.config.resolve import spec_from_dict
from vlm_jax.core import specs, tree
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import ModelSpec
from vlm_jax.core.structs import Inputs
from vlm_jax.data import chat
from vlm_jax.evaluation.answers import Answer, AnswerFile, batches
from vlm_jax.evaluation.benchmarks import files
from vlm_jax.evaluation.benchmarks.items import Item
from vlm_jax.inference.api import PromptRows, answer_length, answer_text, decode, inputs_of_rows, question_ids
from vlm_jax.inference.loading import Model
from vlm_jax.inference.prompts import prepare_image
from vlm_jax.logbook import read_summary
from vlm_jax.sizing import cost

_SYSTEM = {
    "none": "",
    "vicuna_v1": "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
}
_READERS, _AHEAD = 4, 2  # threads that decode images, and batches that they are ahead
_NOTE_SECS = 30.0  # between lines of progress where there is no terminal


class _Prompt(NamedTuple):
    """What an item asks, as token ids."""

    item: Item
    tokens: Int[np.ndarray, " T"]  # a benchmark has many
    question: list[int] | None  # for a compressor that reads the question


def answer(
    model: Model, name: str, items: Sequence[Item], file: AnswerFile, new_tokens: int, system: str, size: int
) -> None:
    """Appends the answers that `file` lacks, greedily, at most `new_tokens` each. A prompt longer than the model's
    context is answered with "" and a note. Raises `UserError` for a model without a tokenizer, or broken images.
    """
    if model.tokenizer is None or model.chat_format is None:
        raise UserError("this model came without a tokenizer: give --tokenizer")
    if system != "none" and model.chat_format.kind != "template":
        print(f"note: a model with chat format {model.chat_format.kind!r} has no system prompt", file=sys.stderr)
        system = "none"
    done = file.matched(items)
    todo = [item for item in items if item.id not in done]
    try:
        prompts = {item.id: _tokenize(model, item, _SYSTEM[system]) for item in todo}
    except UserError as error:  # a template may refuse system prompts
        raise UserError(f"{name}: {error}" + (" (try --set system=none)" if system != "none" else "")) from error
    lengths = {key: len(prompt.tokens) for key, prompt in prompts.items()}
    context = model.spec.decoder.context or 2**20
    too_long = [item for item in todo if lengths[item.id] >= context]
    note = f"the prompt is longer than the context of {context} tokens"
    file.append([Answer(item.question_id, item.prompt, "", None, note) for item in too_long])
    queue = list(batches([i for i in todo if lengths[i.id] < context], lambda item: lengths[item.id], size))
    asked = [[prompts[item.id] for item in batch] for batch in queue]
    with _progress(name, sum(map(len, queue))) as on_done, ThreadPoolExecutor(1) as writer:

        def write(batch: list[_Prompt], rows: list[list[int]]) -> None:
            file.append([_line(model, *pair) for pair in zip(batch, rows, strict=False)])
            on_done(len(batch))

        written: list[Future[None]] = []
        for batch, inputs in _prepared(model, name, asked, size):
            longest = max(len(prompt.tokens) for prompt in batch)
            rows = decode(model, inputs, min(new_tokens, context - longest)).tolist()
            while written:
                written.pop().result()
            written.append(writer.submit(write, batch, rows))
        while written:
            written.pop().result()


def _tokenize(model: Model, item: Item, system: str) -> _Prompt:
    prompt: Any = item.prompt.replace(model.chat_format.image_token, "")
    if system:
        prompt = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    ids = chat.prompt_ids(
        model.chat_format, model.tokenizer, prompt, model.image_token, model.visual_tokens, len(item.images)
    )
    return _Prompt(
        item, np.array(ids, np.int32), question_ids(model, prompt) if model.reads_question and item.images else None
    )


def _prepared(
    model: Model, name: str, queue: Sequence[list[_Prompt]], size: int
) -> Iterator[tuple[list[_Prompt], Inputs]]:
    """Batches with their inputs, two batches ahead: images are decoded in threads while a batch is generated."""

    def read(item: Item) -> list[np.ndarray]:
        paths = [files.read_image(image) for image in item.images]
        return [prepare_image(model, image, f"{name}: {item.id}") for image in paths]

    with ThreadPoolExecutor(_READERS) as pool:
        ahead: deque[list[Future[list[np.ndarray]]]] = deque()
        for number, batch in enumerate(queue):
            for following in queue[number + len(ahead) : number + 1 + _AHEAD]:
                ahead.append([pool.submit(read, prompt.item) for prompt in following])
            images = [future.result() for future in ahead.popleft()]
            yield batch, _inputs(model, batch, images, _row_count(len(batch), size))


def _inputs(model: Model, batch: list[_Prompt], images: list[list[np.ndarray]], rows: int) -> Inputs:
    """Inputs of a batch, whose last row is repeated up to `rows` rows."""
    batch, images = ([*part, *part[-1:] * (rows - len(part))] for part in (batch, images))  # type: ignore[assignment]
    questions = None if batch[0].question is None else [prompt.question or [] for prompt in batch]
    tokens = [prompt.tokens for prompt in batch]
    return inputs_of_rows(model, PromptRows(tokens, images if batch[0].item.images else None, questions))


def _row_count(rows: int, size: int) -> int:
    """Rows of a batch, filled up to a power of two or to `size`, for few compiled programs."""
    return min(size, 1 << (rows - 1).bit_length())


def _line(model: Model, prompt: _Prompt, tokens: list[int]) -> Answer:
    item, asked = prompt.item, len(prompt.tokens) - len(prompt.item.images) * model.visual_tokens
    text = answer_text(model, tokens).strip()
    return Answer(item.question_id, item.prompt, text, (asked, answer_length(model, tokens)))


class _progress:
    """A bar with the time left on a terminal, else a line now and then."""

    def __init__(self, name: str, total: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._name, self._total, self._done, self._start = name, total, 0, time.monotonic()
        self._noted = self._start
        console = Console(stderr=True)
        columns = TextColumn(f"{name:14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(name, total=total)

    def __enter__(self) -> Any:
        self._bar.start()
        return self._advance

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def _advance(self, count: int) -> None:
        self._done += count
        self._bar.advance(self._task, count)
        now = time.monotonic()
        if self._bar.disable and now - self._noted > _NOTE_SECS:
            left = (now - self._start) / self._done * (self._total - self._done)
            minutes = f"{left / 60:.0f} min" if left >= 60 else "less than a minute"
            print(f"{self._name}: {self._done:,} of {self._total:,}, {minutes} left", file=sys.stderr)
            self._noted = now


def row_fields(model: Model, path: Path) -> dict[str, Any]:
    """The fields of a `ResultRow` about the model; `blind` has those that differ without images.

    Raises `UserError` for a text-only model.
    """
    spec = model.spec
    if spec.encoder is None or spec.compressor is None:
        raise UserError(f"{path}: a text-only model sees no benchmark: give one with an image encoder")
    blind = catalog.model_spec(spec.encoder, "blind", 0, spec.decoder, spec.projector, spec.mask)
    return {
        "cell": path.resolve().name,
        "encoder": spec.encoder.name,
        "llm": spec.decoder.name,
        "compressor": spec.compressor.name,
        "llm_params": cost.decoder_params(spec.decoder, "excluded"),
        "llm_params_total": cost.decoder_params(spec.decoder, "included"),
        "visual_tokens": spec.compressor.tokens,
        **_training(path),
        "encoder_sha256": tree.sha256(model.params["encoder"]),
        "params_sha256": tree.sha256(model.params),
        "version": __version__,
        "device": jax.devices()[0].device_kind,
        "model": spec,
        "blind": {"compressor": "blind", "visual_tokens": 0, "model": blind},
    }


def _training(path: Path) -> dict[str, Any]:
    """What a run cost; 0 for published weights."""
    if not (path / "spec.json").is_file():
        return {"train_steps": 0, "train_flops": 0.0, "train_secs": 0.0, "seed": 0}
    spec, summary = spec_from_dict(orbax.read_spec(path)), read_summary(path / "summary.json")
    numbers = {"train_flops": summary["train_flops"], "train_secs": summary["secs"]}
    return {"train_steps": specs.total_steps(spec), **numbers, "seed": spec.seed}


def costs(spec: ModelSpec, answers: Iterable[Answer]) -> dict[str, float]:
    """The fields of a row about tokens and FLOPs: means over the answers whose tokens are known, one image each."""
    known = [answer.tokens for answer in answers if answer.tokens] or [(0, 0)]
    question, new = (float(column) for column in np.mean(known, axis=0))
    flops = cost.row_fields(cost.flops(spec, question, new + 1))
    return {"question_tokens": question, "answer_tokens": new, **flops}
