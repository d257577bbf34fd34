"""easy-VQA, test: 9,673 questions about 1,000 drawn images of one shape, with 13 answers (the package easy-vqa)."""

from collections.abc import Sequence
from pathlib import Path

from vlm_jax.core.errors import UserError
from vlm_jax.evaluation.benchmarks import files
from vlm_jax.evaluation.benchmarks.items import SHORT, Benchmark, Item, Loaded, SuiteOptions

_PARTS = ("data/test", "test")
_LAYOUTS = {
    "easy-VQA": {
        "questions": [f"{part}/questions.json" for part in _PARTS],
        "images": [f"{part}/images" for part in _PARTS],
    }
}
_KINDS = {"yes_no": "yes no", "shape": "circle rectangle triangle"}


def read(data: Path, options: SuiteOptions) -> Loaded:
    found = files.find(data, ("easy_vqa", "easy-vqa"), _LAYOUTS)
    items = []
    for number, row in enumerate(files.read_json(found.path("questions"))):
        if not isinstance(row, list) or len(row) != 3:
            raise UserError(f"{found.path('questions')}: row {number}: expected [question, answer, image], got {row!r}")
        question, answer, image = row
        kind = next((kind for kind, answers in _KINDS.items() if answer in answers.split()), "colour")
        paths, key = (found.path("images") / f"{image}.png",), str(number)
        items.append(Item(key, key, question + SHORT, (answer,), paths, str(image), (f"answer/{kind}",)))
    return Loaded("test", found.layout, items)


def baselines(items: Sequence[Item], options: SuiteOptions) -> dict[str, float]:
    """Random among 13 answers, and always "no"."""
    return {"chance": 1 / 13, "prior": sum(item.references[0] == "no" for item in items) / len(items)}


EASY_VQA = Benchmark("easy_vqa", "gqa", read, {"llava": 128, "lmms-eval": 16}, (9673,), baselines=baselines)
