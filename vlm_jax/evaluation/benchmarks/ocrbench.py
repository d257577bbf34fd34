"""OCRBench: 1,000 questions, a point each.

Text recognition 300, scenes 200, documents 200, key information 200, handwritten formulas 100.
"""

from collections.abc import Sequence
from pathlib import Path

from vlm_jax.evaluation.benchmarks import files
from vlm_jax.evaluation.benchmarks.items import Benchmark, Item, Loaded, SuiteOptions

_LAYOUTS = {
    "OCRBench": {"rows": ("OCRBench.json", "OCRBench/OCRBench.json"), "images": ("OCRBench_Images", "images")},
    "lmms-lab": {"rows": ("data/test-*.parquet", "test-*.parquet")},
}


def read(data: Path, options: SuiteOptions) -> Loaded:
    found = files.find(data, ("ocrbench", "echo840___OCRBench"), _LAYOUTS)
    if found.layout == "lmms-lab":
        rows = files.read_parquet(found.paths["rows"], "dataset", "question", "question_type", "answer", "image")
        rows = [row | {"key": str(number), "name": str(number)} for number, row in enumerate(rows)]
    else:
        rows = files.read_jsonl(found.path("rows"), "dataset_name", "image_path", "question", "answers", "type")
        rows = [
            {
                "dataset": row["dataset_name"], "question": row["question"], "question_type": row["type"],
                "answer": row["answers"], "image": (found.path("images") / row["image_path"],),
                "name": row["image_path"], "key": f"{row.get('id', '')}#{number}",
            }
            for number, row in enumerate(rows)
        ]  # fmt: skip
    return Loaded("test", found.layout, [_item(row) for row in rows])


def _item(row: dict) -> Item:
    answers = (row["answer"],) if isinstance(row["answer"], str) else tuple(map(str, row["answer"]))
    prompt, groups = row["question"].strip(), (f"type/{row['question_type']}",)
    return Item(row["key"], row["key"], prompt, answers, row["image"], row["name"], groups, {"dataset": row["dataset"]})


def baselines(items: Sequence[Item], options: SuiteOptions) -> dict[str, float]:
    return {"chance": 0.0}


OCRBENCH = Benchmark("ocrbench", "ocrbench", read, {"llava": 128, "lmms-eval": 128}, (1000,), baselines=baselines)
