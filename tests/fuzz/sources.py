"""Entries that read data sets, and what a run keeps of them in its cache."""

import contextlib
import functools
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from PIL import Image

from tests.fuzz import hostile, running
from tests.fuzz.folders import folder
from vlm_jax import check_data
from vlm_jax.core import text
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import DataSpec, SourceSpec
from vlm_jax.core.structs import Visual
from vlm_jax.data import checking, features, images, tokenized
from vlm_jax.data.conversations import Conversation
from vlm_jax.data.examples import BadItem, Example, Source, Turn
from vlm_jax.data.packing import RowLayout
from vlm_jax.data.readers.open import open_source
from vlm_jax.distributed import ownership

ROOT = Path(__file__).parents[2]
_LLAVA = [
    {"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat is this?"},
                                                    {"from": "gpt", "value": "A bus."}]},
    {"id": 2, "image": ["a.png", "b.jpg"], "conversations": [{"from": "human", "value": "<image><image> Which?"},
                                                             {"from": "gpt", "value": "Both."}]},
    {"id": "3", "conversations": [{"from": "system", "value": "Hi"}, {"from": "human", "value": "Who?"},
                                  {"from": "gpt", "value": "Ada"}]},
]  # fmt: skip
_ROWS = [
    {"id": "1", "image": "a.png", "prefix": "answer en what?", "suffix": "a bus", "rating": 4},
    {"image": ["a.png"], "prefix": "who?", "suffix": ["Ada", "Bob"], "rating": None},
    {"prefix": "", "suffix": 3},
]


@functools.cache
def png() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (4, 3)).save(content, "PNG")
    return content.getvalue()


def _records(rows: list[dict[str, Any]], rng: random.Random) -> bytes:
    """A JSON array or JSON Lines, of which some are hostile."""
    if rng.random() < 0.5:
        return hostile.json_bytes(rows, rng)
    lines = [json.dumps(row).encode() for row in rows] * rng.choice((1, 1, 40))
    for i in rng.sample(range(len(lines)), rng.choice((1, 1, 3))):
        lines[i] = hostile.json_bytes(rows[i % len(rows)], rng)
    return b"\n".join(lines)


def _spec(kind: str, rng: random.Random, path: str, **given: Any) -> SourceSpec:
    """A source with one hostile setting at most."""
    hostile_settings: dict[str, Callable[[], Any]] = {
        "take": lambda: rng.choice(("first:1", "random:50%", "end:²", "first:1e9", "random:1/0", hostile.text(rng))),
        "images": lambda: rng.choice(("missing", "a.png", hostile.text(rng))),
        "split": lambda: rng.choice(("train", "train[:10%]", "train[²:]", hostile.text(rng))),
        "fields": lambda: ((rng.choice(("id", "image", "answer", hostile.text(rng))), hostile.text(rng)),),
        "options": lambda: ((rng.choice(("rating", hostile.text(rng))), hostile.value(rng)),),
        "path": lambda: rng.choice(("{a,b}.json", "*", "[", "~/x", "../*", "/dev/zero", hostile.text(rng))),
    }
    settings: dict[str, Any] = {"path": path, **given}
    if rng.random() < 0.3:
        name = rng.choice(list(hostile_settings))
        settings[name] = hostile_settings[name]()
    return SourceSpec(kind, **settings)


def _use(spec: SourceSpec, path: Path) -> None:
    """Reads all items as tokenizing and training do."""
    source = open_source(spec, path / "cache")
    assert source.fingerprint
    for i in range(min(len(source), 60)):
        with contextlib.suppress(BadItem):
            example = source.without_images(i)
            assert text.is_printable(example.id) or example.id.encode()
        with contextlib.suppress(BadItem, UserError):
            for image in source[i].images[:2]:
                images.read_image(image)


def _folder(path: Path) -> Path:
    (path / "a.png").write_bytes(png())
    (path / "b.jpg").write_bytes(png()[:30])
    return path


def llava(rng: random.Random, path: Path) -> None:
    """LLaVA's json and jsonl, and the yaml that lists some."""
    file = _folder(path) / rng.choice(("train.json", "train.jsonl"))
    hostile.maybe_no_file(hostile.write(file, _records(_LLAVA, rng)), rng)
    if rng.random() < 0.15:
        listed = json.dumps(hostile.changed({"datasets": [{"json_path": file.name, "sampling_strategy": "all"}]}, rng))
        bombs = ("a: &a [*a]", "[" * 5000, "!!python/object/apply:os.system ['touch x']", "datasets: 3", "\0", listed)
        content = rng.choice((*bombs, hostile.text(rng), listed, listed)).encode("utf-8", "surrogatepass")
        file = hostile.maybe_no_file(hostile.write(path / "all.yaml", content), rng)
    _use(_spec("llava", rng, str(file)), path)


def jsonl(rng: random.Random, path: Path) -> None:
    """big_vision's rows."""
    file = _folder(path) / "rows.jsonl"
    hostile.maybe_no_file(hostile.write(file, _records(_ROWS, rng)), rng)
    _use(_spec("jsonl", rng, str(file)), path)


def _column(rng: random.Random, rows: int) -> pa.Array:
    """A column of hostile values of one type."""
    value = rng.choice((
        hostile.text(rng).encode("utf-8", "backslashreplace").decode(), b"\xff\0", 7, float("nan"), True, None,
        [1, None], {"bytes": b"x", "path": None}, {"user": None, "assistant": 3}, [{"from": "human", "value": "a"}],
        [[]], [{"bytes": None, "path": "../a.png"}], 2**63 - 1, [{"user": "a", "assistant": "b", "source": "c"}] * 9,
    ))  # fmt: skip
    return pa.array([rng.choice((value, value, None)) for _ in range(rows)])


def parquet(rng: random.Random, path: Path) -> None:
    """Parquet files with other types and columns, or damaged."""
    image = {"bytes": png(), "path": "a.png"}
    columns: dict[str, Any] = {
        "id": ["1", "2", "3"], "image": [image, None, image], "rating": [1, None, 3],
        "conversations": [row["conversations"] for row in _LLAVA],
    }  # fmt: skip
    if rng.random() < 0.4:
        turns = [{"user": "What?", "assistant": "A bus.", "source": "x"}]
        columns = {"images": [[image], [], [image, image]], "texts": [turns, turns * 2, []], "rating": [1, 2, None]}
    arrays = [pa.array(values) for values in columns.values()]
    names = list(columns)
    for _ in range(rng.choice((0, 1, 1, 2))):
        i = rng.randrange(len(names))
        if rng.random() < 0.7:
            arrays[i] = _column(rng, 3)
        else:
            other = hostile.text(rng).encode("utf-8", "backslashreplace").decode()[:300]
            names[i] = rng.choice((other, "question", "answer", "id", "image.bytes"))
    try:
        table = pa.Table.from_arrays(arrays, names)
        pq.write_table(table.slice(0, rng.choice((0, 3, 3, 3))), path / "train.parquet", row_group_size=2)
    except (pa.ArrowException, ValueError):
        return
    _folder(path)
    if rng.random() < 0.4:
        hostile.write(path / "train.parquet", hostile.broken((path / "train.parquet").read_bytes(), rng))
    hostile.maybe_no_file(path / "train.parquet", rng)
    where = rng.choice((str(path / "train.parquet"), str(path)))
    _use(_spec("parquet", rng, where), path)


@functools.cache
def _tfds_files() -> dict[str, bytes]:
    with tarfile.open(ROOT / "tests/data/fixtures/tfds.tar.gz") as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        return {member.name: archive.extractfile(member).read() for member in members}  # type: ignore[union-attr]


def tfds_folder(rng: random.Random, path: Path) -> None:
    """A builder's folder with a hostile file."""
    for name, content in _tfds_files().items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    file = path / rng.choice(list(_tfds_files()))
    content = file.read_bytes()
    new = hostile.json_bytes(json.loads(content), rng) if file.suffix == ".json" else hostile.broken(content, rng)
    hostile.maybe_no_file(hostile.write(file, new), rng)
    if rng.random() < 0.2:
        (file.parent.parent / rng.choice(("²", "1.0.²", "9" * 200, "1..0", "\x1b[31m"))).mkdir(exist_ok=True)
    fields = (("image", "picture"), ("question", "views/about"), ("answer", "caption"))
    spec = _spec("tfds", rng, str(rng.choice((path, file.parent))), split="train")
    _use(spec if spec.fields else SourceSpec(**{**vars(spec), "fields": fields}), path)


class _Numbers(Source):
    """Number N is asked for N; the third cannot be used."""

    name = fingerprint = "numbers"

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Example:
        if index == 3:
            raise BadItem("empty turn", "3")
        return Example(str(index), (png(),), (Turn("user", "<image>\nWhich?"), Turn("assistant", f"{index}.")))


def _tokenize(folder: Path) -> tokenized.TokenizedDataset:
    made = Conversation([1, -1, 5, 6], [False, False, True, True], [4])
    return tokenized.open_tokenized(_Numbers(), False, lambda turns, count: made, lambda turns: [3], "key", folder)


def tokens(rng: random.Random, path: Path) -> None:
    """A folder of tokens in the cache whose files were changed; read, packed and reported."""
    _tokenize(path / "tokens")
    (made,) = (one for one in (path / "tokens").iterdir() if one.is_dir())
    file = rng.choice(sorted(made.iterdir()))
    if file.suffix == ".json":
        content = hostile.json_bytes(json.loads(file.read_bytes()), rng)
    else:
        content = file.read_bytes()
        new = np.frombuffer(content, np.uint8).copy()
        for _ in range(rng.choice((1, 1, 8))):
            new[rng.randrange(len(new))] = rng.choice((0, 1, 7, 255))
        content = new.tobytes() if rng.random() < 0.7 else hostile.broken(content, rng)
    hostile.maybe_no_file(hostile.write(file, content), rng)
    if rng.random() < 0.1:
        hostile.no_file(path / "tokens" / f"{made.name}.lock", rng)
    dataset = _tokenize(path / "tokens")
    spec = DataSpec((), (), "v1", rng.choice(("none", "fit")), 2, 64, 2, 0, False)
    mixture = tokenized.mix([dataset], ["numbers"], [1.0])
    report = checking.check("train", mixture, spec, RowLayout(4, "causal", False, False), 0, lambda done, total: None)
    json.dumps(checking.as_json([report]))
    checking.text(report)


def _encode(pixels: np.ndarray) -> Visual:
    return Visual(np.asarray(pixels[:, :2, :2, 0], np.float32).reshape(len(pixels), 4, 1) / 255)


def stored_features(rng: random.Random, path: Path) -> None:
    """A store of features in the cache whose files were changed."""
    pixels = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    shown = features.Images(3, lambda i: bytes([i]), lambda i: pixels[i], 4, "numbers")
    features.open_or_compute(path, "store", shown, _encode)
    file = path / "store" / rng.choice(("tokens.npy", "taps.npy", "index.npy", "bad.json", "meta.json"))
    if file.suffix == ".json":
        hostile.write(file, hostile.json_bytes(json.loads(file.read_bytes()), rng))
    elif file.exists() and rng.random() < 0.7:
        hostile.write(file, hostile.broken(file.read_bytes(), rng))
    else:
        np.save(file, rng.choice((np.zeros(3), np.zeros((3, 4, 1), "f2"), np.array([0, 1, -1]), np.array(["a"] * 3))))
    hostile.maybe_no_file(file, rng)
    if rng.random() < 0.1:
        hostile.no_file(path / "store.lock", rng)
    features.open_or_compute(path, "store", shown, _encode).read(np.arange(3))


def owner(rng: random.Random, path: Path) -> None:
    """What names the owner of a workdir, and its lock."""
    written = {"host": "a", "pid": 3, "start": "2024-01-01 00:00:00 +0000"}
    hostile.maybe_no_file(hostile.write(path / "owner.json", hostile.json_bytes(written, rng)), rng, 0.2)
    if rng.random() < 0.3:
        hostile.no_file(path / "run.lock", rng)
    ownership._owner(path)
    with ownership.own_workdir(path):
        (path / "owner.json").read_text()
    with ownership.own_workdir(rng.choice((path / "new", path / "owner.json", path / ("x" * 300)))):
        pass


def check(rng: random.Random, path: Path) -> None:
    """`check_data` over a file of conversations."""
    os.environ["VLM_JAX_CACHE"] = str(path / "cache")
    hostile.maybe_no_file(hostile.write(_folder(path) / "train.json", _records(_LLAVA, rng)), rng)
    part = rng.choice(
        ("plain", "plain", "prefix", "template", hostile.text(rng)[:40].replace(",", "").replace("\0", ""))
    )
    arguments = f"data=train.json,images=.,tokenizer={folder('llava', path / 'model')},format={part},stage=2,batch=16"
    argv = ["--config", f"{ROOT / 'configs/llava.py'}:{arguments}", "--config.data.max_bad_share=1.0"]
    if rng.random() < 0.3:
        argv += ["--json", rng.choice(("report.json", "missing/report.json", ".", "a.png/x"))]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown), running.errors_of_disk():
        check_data.main(argv)
    assert text.is_printable(shown.getvalue())


def warm() -> None:
    png()
    _tfds_files()
    _ = tfds.builder_from_directory  # imported when it is first used


ENTRIES = {
    "LLaVA files": llava, "jsonl rows": jsonl, "parquet": parquet, "TFDS folders": tfds_folder,
    "tokens in the cache": tokens, "features in the cache": stored_features, "owner of a workdir": owner,
    "check_data": check,
}  # fmt: skip
