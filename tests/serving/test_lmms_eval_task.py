"""The files of the task that lmms-eval reads, and how its samples are read back."""

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import yaml

from experiments.lmms_eval import run, task
from tests.golden import peers_answers
from vlm_jax.data.images import read_image


class Loader(yaml.SafeLoader):
    """lmms-eval's tag names a function of a file beside the yaml."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def test_the_task_names_its_files_and_its_functions_read_them(tmp_path: Path) -> None:
    photograph = peers_answers.photograph("china.jpg").read_bytes()
    task.write(tmp_path / "task", [task.DrawnQuestion(photograph, "read", "yes")] * 3, 7)
    described = yaml.load((tmp_path / "task" / f"{task.NAME}.yaml").read_text(), Loader)
    assert described["task"] == task.NAME
    assert described["generation_kwargs"] == {"max_new_tokens": 7, "temperature": 0}
    rows = pq.read_table(described["dataset_kwargs"]["data_files"]["test"]).to_pylist()
    assert len(rows) == 3
    assert rows[0][described["doc_to_target"]] == "yes"
    module, visual = described["doc_to_visual"].split(".")
    spec = importlib.util.spec_from_file_location(module, tmp_path / "task" / f"{module}.py")
    assert spec is not None
    assert spec.loader is not None
    functions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(functions)
    (image,) = getattr(functions, visual)(rows[0])
    np.testing.assert_array_equal(np.asarray(image), read_image(photograph))
    assert getattr(functions, described["doc_to_text"].split(".")[1])(rows[0]) == "read"


def test_an_answer_is_read_from_a_sample() -> None:
    assert run.answer_of({"filtered_resps": ["two"]}) == "two"
    assert run.answer_of({"filtered_resps": [["two"]]}) == "two"
