"""VizWiz-VQA: validation (4,319 questions) is scored here; test (8,000) by the EvalAI server (`submissions`)."""

from pathlib import Path

from vlm_jax.evaluation.benchmarks import files
from vlm_jax.evaluation.benchmarks.items import SHORT, Benchmark, Item, Loaded, SuiteOptions

_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
_LAYOUTS = {
    "VizWiz": {"truth": ("val.json", "Annotations/val.json"), "images": ("val",)},
    "lmms-lab": {"rows": ("data/val-*.parquet",)},
    "LLaVA": {"questions": ("llava_test.jsonl",), "images": ("test",)},
    "lmms-lab test": {"rows": ("data/test-*.parquet",)},
}


def read(data: Path, options: SuiteOptions) -> Loaded:
    found = files.find(data, ("vizwiz", "VizWiz-VQA"), _LAYOUTS)
    split = "test" if found.layout in ("LLaVA", "lmms-lab test") else "val"
    if found.layout.startswith("lmms-lab"):
        rows = files.read_parquet(found.paths["rows"], "question_id", "image", "question")
        return Loaded(split, found.layout, [_item(row | {"name": f"{row['question_id']}.jpg"}) for row in rows])
    if found.layout == "LLaVA":
        rows = files.read_jsonl(found.path("questions"), "question_id", "image", "text")
        rows = [row | {"question": row["text"].removesuffix(_UNANSWERABLE + SHORT)} for row in rows]
    else:
        rows = files.read_jsonl(found.path("truth"), "image", "question", "answers")
        rows = [row | {"question_id": row["image"]} for row in rows]
    for row in rows:
        row |= {"name": row["image"], "image": (found.path("images") / row["image"],)}
    return Loaded(split, found.layout, [_item(row) for row in rows])


def _item(row: dict) -> Item:
    answers = (answer["answer"] if isinstance(answer, dict) else answer for answer in row.get("answers") or ())
    groups = tuple(f"{name}/{row[name]}" for name in ("answer_type", "category") if row.get(name))
    prompt, key = row["question"].capitalize() + _UNANSWERABLE + SHORT, str(row["question_id"])
    return Item(key, key, prompt, tuple(answers), row["image"], row["name"], groups, {"image": row["name"]})


VIZWIZ = Benchmark("vizwiz", "vizwiz", read, {"llava": 128, "lmms-eval": 1024}, (4319, 8000))
