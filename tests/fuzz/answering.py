"""Entries that read benchmarks, answers, requests and conversations."""

import base64
import dataclasses
import functools
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests import builders
from tests.evaluation import benchmark_files
from tests.fuzz import hostile
from tests.fuzz.asking import llava_tokenizer
from tests.fuzz.folders import folder
from tests.fuzz.sources import png
from vlm_jax.compress import catalog
from vlm_jax.core import text
from vlm_jax.core.errors import UserError
from vlm_jax.data import chat_formats, conversations, tokenizers
from vlm_jax.data.examples import BadItem, Turn
from vlm_jax.data.readers import turns as readers
from vlm_jax.evaluation import benchmarks, metrics, submissions, suite_run, suite_scores, suites
from vlm_jax.evaluation.answers import Answer, AnswerFile
from vlm_jax.inference.loading import Model
from vlm_jax.inference.serving.jobs import prepare
from vlm_jax.inference.serving.requests import RequestError, ServingSpec, parse

_TEXT_FILES = (".json", ".jsonl", ".tsv", ".txt", ".parquet")


@functools.cache
def _benchmarks() -> dict[str, dict[str, bytes]]:
    """The files of each benchmark, by benchmark."""
    out = {}
    for writer in benchmark_files.WRITERS:
        with tempfile.TemporaryDirectory() as place:
            writer(Path(place))
            files = [file for file in Path(place).rglob("*") if file.is_file()]
            out[writer.__name__] = {str(file.relative_to(place)): file.read_bytes() for file in files}
    return out


def _changed_parquet(file: Path, rng: random.Random) -> None:
    table = pq.read_table(file)
    names, i = list(table.column_names), rng.randrange(table.num_columns)
    kind = rng.random()
    if kind < 0.3:
        hostile.write(file, hostile.broken(file.read_bytes(), rng))
        return
    if kind < 0.5:
        names[i] = hostile.text(rng).encode("utf-8", "backslashreplace").decode()[:100]
        table = table.rename_columns(names)
    elif kind < 0.6:
        table = table.drop_columns([names[i]])
    else:
        value = rng.choice(
            (None, 3, "a", b"\xff", [1], {"bytes": b"x"}, {"bytes": None}, [], float("nan"), [None], True)
        )
        column = pa.array([value] * table.num_rows)
        table = table.set_column(i, names[i], column)
    try:
        pq.write_table(table, file)
    except pa.ArrowException:
        return


def benchmark(rng: random.Random, path: Path) -> None:
    """A benchmark with a hostile file; loaded, and scored with hostile answers."""
    name = rng.choice(list(_benchmarks()))
    for file, content in _benchmarks()[name].items():
        (path / "data" / file).parent.mkdir(parents=True, exist_ok=True)
        (path / "data" / file).write_bytes(content)
    files = sorted(file for file in (path / "data").rglob("*") if file.suffix in _TEXT_FILES)
    # Layouts are looked for in order: without the parquet files, or without the others.
    kept = rng.choice((files, [file for file in files if file.suffix == ".parquet"] or files))
    for file in set(files) - set(kept):
        file.unlink()
    for file in rng.sample(kept, min(len(kept), rng.choice((1, 1, 2)))):
        _change(file, rng)
        hostile.maybe_no_file(file, rng)
    options = suites.with_settings(
        suites.SUITES["quecc"].options,
        [f"{key}={rng.choice(values)}" for key, values in suites.VALUES.items() if rng.random() < 0.5],
    )
    found = benchmarks.find(name)
    loaded = benchmarks.load(found, path / "data", options)
    answers = {
        item.id: Answer(
            item.question_id, item.prompt, rng.choice(("yes", "A", "4 7", text.printable(hostile.text(rng))))
        )
        for item in loaded.items
    }
    suite_scores.score(found, loaded, answers, options)
    submissions.write(name, loaded, answers, path / "data", path / "out")


def _change(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    if file.suffix == ".parquet":
        _changed_parquet(file, rng)
    elif file.suffix == ".json" and not content.count(b"\n"):
        hostile.write(file, hostile.json_bytes(json.loads(content), rng))
    elif file.suffix in (".json", ".jsonl"):
        lines = content.splitlines()
        i = rng.randrange(len(lines))
        lines[i] = hostile.json_bytes(json.loads(lines[i]), rng)
        hostile.write(file, b"\n".join(lines))
    else:
        rows = [line.split("\t") for line in content.decode().splitlines()] or [[""]]
        row = rng.choice(rows)
        row[rng.randrange(len(row))] = hostile.text(rng)
        changed = "\n".join("\t".join(row) for row in rows).encode("utf-8", "surrogatepass")
        hostile.write(file, hostile.broken(content, rng) if rng.random() < 0.4 else changed)


_ANSWERS = [
    {"question_id": "1", "prompt": "read row two", "text": "4 7", "tokens": [9, 3]},
    {"question_id": "2", "prompt": "who?", "text": "Ada", "note": "too long"},
]
_MODEL = {
    "cell": "a", "params_sha256": "ab", "model": {}, "visual_tokens": 4, "blind": {"model": {}, "visual_tokens": 0},
}  # fmt: skip


def answer_files(rng: random.Random, path: Path) -> None:
    """Stored answers and the record of an evaluation, scored again."""
    for file, content in _benchmarks()["own"].items():
        (path / "data" / file).parent.mkdir(parents=True, exist_ok=True)
        (path / "data" / file).write_bytes(content)
    suite = suites.find(None, ["own"], [])
    lines = [json.dumps(line).encode() for line in _ANSWERS]
    if rng.random() < 0.8:
        i = rng.randrange(2)
        lines[i] = hostile.json_bytes(_ANSWERS[i], rng)
    (path / "out/answers").mkdir(parents=True)
    content = b"\n".join(lines) + rng.choice((b"\n", b"\n", b""))
    hostile.maybe_no_file(hostile.write(path / "out/answers/own.jsonl", content), rng)
    if rng.random() < 0.5:
        options = dict(zip(suites.ASKING, ("llava", "none", "none", 0), strict=True))
        costs = {"answers": {"own": {"question_tokens": 9.0}}}
        record = {"suite": "custom", "options": options, "model": _MODEL, "costs": costs}
        hostile.maybe_no_file(hostile.write(path / "out/run.json", hostile.json_bytes(record, rng)), rng)
    loaded = suite_run.load(suite, path / "data", 0)
    AnswerFile(path / "out/answers/own.jsonl").append([Answer("3", hostile.text(rng), hostile.text(rng))])
    if rng.random() < 0.5:
        suite_run.begin(path / "out", suite, _MODEL)
        suite_run.add_costs(path / "out", "answers", {"own": {"question_tokens": 1.0}})
    for line in suite_run.finish(suite, loaded, path / "data", path / "out", 0):
        assert text.is_printable(line)


_EXTRA = ("options", "choices", "answer", "question_type", "answer_type", "precision", "dataset", "groups", "images",
          "types")  # fmt: skip


def scores(rng: random.Random, path: Path) -> None:
    """The arguments of `score`."""

    def one() -> Any:
        return rng.choice((hostile.text(rng), "yes", "B", "(B)", "3.5", "12%", hostile.value(rng)))

    name = rng.choice((*metrics.RULES, hostile.text(rng)))
    prediction = one() if rng.random() < 0.8 else [one() for _ in range(rng.choice((0, 1, 2, 4)))]
    several = [str(one()) if rng.random() < 0.95 else one() for _ in range(rng.choice((0, 1, 2, 4)))]
    if name in metrics._OF_LISTS and rng.random() < 0.7:
        prediction = list(several)
    references = rng.choice((several, several, dict(zip("ABCDE", several, strict=False)), one()))
    extra = {key: rng.choice((one(), several, [several] * len(several))) for key in _EXTRA if rng.random() < 0.15}
    if "precision" in extra:
        extra["answer_type"] = "float"
    metrics.score(name, prediction, references, rng.choice((*metrics.FLAVOURS, hostile.text(rng))), **extra)


_BODY = {
    "model": "m", "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["a"], "stream": True,
    "stream_options": {"include_usage": True}, "n": 1,
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What?"},
                                     {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBO"}}]},
        {"role": "assistant", "content": "A bus."}, {"role": "user", "content": "Why?"},
    ],
}  # fmt: skip
_URLS = ("http://169.254.169.254/", "file:///etc/passwd", "/etc/passwd", "data:,", "data:image/png;base64,!!", "ftp://a",
         "data:image/png;base64," + "A" * 10**6, "data:image/svg+xml;base64,PHN2Zz4=")  # fmt: skip


@functools.cache
def _model() -> Model:
    """A model without weights: enough to prepare a request."""
    decoder = dataclasses.replace(builders.DECODER, vocab=2 * llava_tokenizer().size)
    spec = catalog.model_spec(builders.ENCODER, "pool", 4, decoder)
    chat_format = chat_formats.chat_format_of("LlavaForConditionalGeneration", llava_tokenizer(), "<image>")
    image_token = llava_tokenizer().id("<image>")
    return Model(spec, builders.COMPUTE, {}, None, llava_tokenizer(), chat_format, image_token, 0, (2,))


def request(rng: random.Random, path: Path) -> None:
    """Bodies of chat completion requests."""
    body = json.loads(json.dumps(_BODY))
    content = base64.b64encode(hostile.broken(png(), rng) if rng.random() < 0.3 else png()).decode()
    url = rng.choice((*_URLS, f"data:image/png;base64,{content}", f"data:image/png;base64,{content}"))
    body["messages"][1]["content"][1]["image_url"] = rng.choice(({"url": url}, {"url": url}, url))
    if rng.random() < 0.3:
        body["messages"][1]["content"][0]["text"] = rng.choice(("<image>", hostile.text(rng)))
    plain = json.dumps(body).encode()
    try:
        prepare(_model(), parse(plain if rng.random() < 0.3 else hostile.json_bytes(body, rng), "m"), ServingSpec())
    except RequestError as error:
        if not 400 <= error.status < 500 or "\n" in error.message or not text.is_printable(error.message):
            raise AssertionError(f"{error.status}: {error.message}") from error
        raise UserError(error.message) from error


@functools.cache
def _tokenizer() -> tokenizers.Tokenizer:
    """One with the tokens of every format."""
    with tempfile.TemporaryDirectory() as place:
        model = folder("llava", Path(place))
        return tokenizers.read_tokenizer(model, {}, ("<image>", "<|im_start|>", "<|im_end|>"))


def turns(rng: random.Random, path: Path) -> None:
    """Conversations as data sets write them, through every named chat format."""
    name = rng.choice((*chat_formats.NAMES, *chat_formats.NAMES, hostile.text(rng)))
    tokenizer = rng.choice((_tokenizer(), _tokenizer(), llava_tokenizer()))
    messages: Any = [
        {"from": "human", "value": rng.choice(("<image>\n", "")) + hostile.text(rng)},
        {"from": "gpt", "value": rng.choice(("{{ 7 * 7 }}", "{% for %}", "</s>", "<|im_end|>", hostile.text(rng)))},
    ] * rng.choice((1, 1, 2, 9))  # fmt: skip
    if rng.random() < 0.3:
        messages = [{"from": "system", "value": hostile.text(rng)}, *messages]
    messages = hostile.changed(messages, rng, rng.choice((0, 0, 1)))
    try:
        read = readers.read_messages("id", messages)
        if rng.random() < 0.2:
            read = (*read, Turn(rng.choice(("user", "assistant", hostile.text(rng))), hostile.text(rng)))
    except BadItem as error:
        raise UserError(str(error)) from error
    chat_format = chat_formats.format_named(name, tokenizer)
    made = conversations.tokenize(chat_format, tokenizer, read, rng.choice((None, None, 0, 1)))
    assert len(made.ids) == len(made.target)
    assert all(0 < end <= len(made.ids) for end in made.turn_ends)


def warm() -> None:
    _benchmarks()
    _tokenizer()
    _model()


ENTRIES = {
    "benchmarks": benchmark, "answers": answer_files, "arguments of score": scores, "requests": request,
    "conversations": turns,
}  # fmt: skip
