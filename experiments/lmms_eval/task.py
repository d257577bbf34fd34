"""A task of lmms-eval's own format over the drawn questions of a run: a yaml, functions, and a parquet file."""

import json
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vlm_jax.data.examples import Source

NAME = "drawn_questions"

_YAML = """\
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {parquet}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.images
doc_to_text: !function functions.question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  temperature: 0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: true
metadata:
  - version: 0.0
"""

_FUNCTIONS = '''\
"""Run by lmms-eval."""

import io

from PIL import Image


def images(doc):
    return [Image.open(io.BytesIO(doc["image"])).convert("RGB")]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
'''


class DrawnQuestion(NamedTuple):
    """One question of the test split."""

    image: bytes  # PNG
    question: str
    answer: str


def read(source: Source, count: int) -> list[DrawnQuestion]:
    """The first question of each of the first `count` examples."""
    found = []
    for index in range(min(count, len(source))):
        (image,), (question, answer, *_) = source[index].images, source[index].turns
        found.append(DrawnQuestion(image, question.text.removeprefix("<image>"), answer.text))
    return found


def write(folder: Path, questions: list[DrawnQuestion], max_new_tokens: int) -> None:
    """Writes the task for `--include_path folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: [getattr(each, name) for each in questions] for name in DrawnQuestion._fields})
    parquet = folder.resolve() / "test.parquet"
    pq.write_table(table, parquet)
    (folder / "functions.py").write_text(_FUNCTIONS)
    text = _YAML.format(name=NAME, parquet=json.dumps(str(parquet)), max_new_tokens=max_new_tokens)
    (folder / f"{NAME}.yaml").write_text(text)
