"""Questions of your own: `DATA/own/questions.jsonl` and the images that it names.

    {"question_id": "1", "image": "pages/1.png", "text": "read row two", "answer": "4 7", "group": "rows"}

`text` is the whole prompt, `answer` one text or a list of right ones, `image` a path from `DATA/own` (none for text
only), `group` optional. The score is GQA's: equality without case and final periods.
"""

from pathlib import Path

from vlm_jax.evaluation.benchmarks import files
from vlm_jax.evaluation.benchmarks.items import Benchmark, Item, Loaded, SuiteOptions

_LAYOUTS = {"jsonl": {"questions": ("questions.jsonl",)}}


def read(data: Path, options: SuiteOptions) -> Loaded:
    found = files.find(data, ("own",), _LAYOUTS)
    path = found.path("questions")
    rows = files.read_jsonl(path, "question_id", "text", "answer")
    return Loaded("own", found.layout, [_item(row, path.parent) for row in rows])


def _item(row: dict, folder: Path) -> Item:
    answers = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
    key, image = str(row["question_id"]), row.get("image")
    images, groups = (folder / image,) if image else (), (f"group/{row['group']}",) if row.get("group") else ()
    references = tuple(answer.lower() for answer in answers)  # the rule compares with answers in lower case
    return Item(key, key, row["text"], references, images, image or key, groups)


OWN = Benchmark("own", "gqa", read, {"llava": 128, "lmms-eval": 128}, ())
