"""MMMU, validation: 900 questions of 30 college subjects, with up to seven images.

The score is the mean over questions. Where the official parser draws a random letter, the expectation is scored.
"""

import ast
import re
from collections.abc import Sequence
from pathlib import Path

from vlm_jax.core.errors import UserError
from vlm_jax.evaluation.benchmarks import files
from vlm_jax.evaluation.benchmarks.items import LETTER, SHORT, Benchmark, Item, Loaded, SuiteOptions, lettered
from vlm_jax.evaluation.metrics import choices

_LAYOUTS = {
    "lmms-lab": {"rows": ("data/validation-*.parquet",)},
    "MMMU": {"rows": ("*/validation-*.parquet",)},
}
_DISCIPLINES = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy"
    " Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power"
    " Materials Mechanical_Engineering",
}
_DISCIPLINE = {subject: name for name, subjects in _DISCIPLINES.items() for subject in subjects.split()}


def read(data: Path, options: SuiteOptions) -> Loaded:
    found = files.find(data, ("mmmu",), _LAYOUTS)
    rows = files.read_parquet(found.paths["rows"], "id", "question", "options", "answer", "question_type", "image_1")
    return Loaded("validation", found.layout, [_item(row, options, found.path("rows")) for row in rows])


def _item(row: dict, options: SuiteOptions, path: Path) -> Item:
    listed = _listed(row["options"])
    if row["question_type"] == "multiple-choice":
        prompt = f"{row['question']}\n{lettered(listed)}\n{LETTER}"
    else:
        listed, prompt = [], f"{row['question']}\n{SHORT}"
    numbers = sorted(set(re.findall(r"<image (\d)>", prompt)))
    images = tuple(image for number in numbers for image in row.get(f"image_{number}") or ())
    if len(images) != len(numbers):
        raise UserError(f"{path}: {row['id']}: expected images {', '.join(numbers)}, got {len(images)}")
    # The published answers of an open question are a list as text; lmms-eval compares that text.
    is_list = str(row["answer"]).startswith("[") and options.flavour != "lmms-eval"
    answers = tuple(map(str, _listed(row["answer"]))) if is_list else (str(row["answer"]),)
    subject = re.sub(r"^[a-z]+_|_\d+$", "", row["id"])
    groups = (f"subject/{subject}", f"discipline/{_DISCIPLINE.get(subject, 'other')}")
    return Item(row["id"], row["id"], prompt, answers, images, row["id"], groups, {"options": listed})


def _listed(value: object) -> list:
    """A list, also one that is written as text."""
    try:
        return list(ast.literal_eval(value)) if isinstance(value, str) else list(value or ())  # type: ignore[call-overload]
    except (ValueError, SyntaxError) as error:
        raise UserError(f"mmmu: expected a list of options, got {value!r}") from error


def fails(item: Item, text: str, options: SuiteOptions) -> bool:
    read_letter = choices.mmmu_lmms_eval if options.flavour == "lmms-eval" else choices.mmmu
    listed = item.extra["options"]
    return not text.strip() if not listed else read_letter(text, choices.as_options(listed)) is None


def baselines(items: Sequence[Item], options: SuiteOptions) -> dict[str, float]:
    """Random and most frequent choice (MMMU, table 2)."""
    return {"chance": 0.221, "prior": 0.268}


MMMU = Benchmark("mmmu", "mmmu", read, {"llava": 128, "lmms-eval": 128}, (900,), fails, baselines=baselines)
