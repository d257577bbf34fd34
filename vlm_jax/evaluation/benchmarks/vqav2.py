"""VQAv2: validation (214,354 questions) is scored here; test-dev (107,394) by the EvalAI server (`submissions`)."""

from collections.abc import Sequence
from pathlib import Path

from vlm_jax.evaluation.benchmarks import files
from vlm_jax.evaluation.benchmarks.items import SHORT, Benchmark, Item, Loaded, SuiteOptions, without

_LAYOUTS = {
    "VQA": {
        "questions": ("v2_OpenEnded_mscoco_val2014_questions.json",),
        "truth": ("v2_mscoco_val2014_annotations.json",),
        "images": ("val2014",),
    },
    "lmms-lab": {"rows": ("data/validation-*.parquet",)},
    "LLaVA": {"questions": ("llava_vqav2_mscoco_test-dev2015.jsonl",), "images": ("test2015",)},
    "lmms-lab test-dev": {"rows": ("data/testdev-*.parquet",)},
}


def read(data: Path, options: SuiteOptions) -> Loaded:
    found = files.find(data, ("vqav2",), _LAYOUTS)
    if found.layout == "VQA":
        questions = files.read_json(found.path("questions"))["questions"]
        truth = {row["question_id"]: row for row in files.read_json(found.path("truth"))["annotations"]}
        ids = [row["question_id"] for row in questions]
        pairs = zip(questions, files.look_up("vqav2", ids, truth, found.path("truth")), strict=True)
        rows = [question | answer for question, answer in pairs]
        for row in rows:
            row["image"] = (found.path("images") / f"COCO_val2014_{row['image_id']:012d}.jpg",)
        return Loaded("validation", found.layout, [_item(row) for row in rows])
    if found.layout.startswith("lmms-lab"):
        rows = files.read_parquet(found.paths["rows"], "question_id", "question", "image", "image_id")
        split = "testdev" if "test-dev" in found.layout else "validation"
        return Loaded(split, found.layout, [_item(row) for row in rows])
    rows = files.read_jsonl(found.path("questions"), "question_id", "image", "text")
    for row in rows:
        row |= {"question": without(row["text"], SHORT), "image_id": row["image"]}
        row["image"] = (found.path("images") / row["image"],)
    return Loaded("testdev", found.layout, [_item(row) for row in rows])


def _item(row: dict) -> Item:
    groups = tuple(f"{name}/{row[name]}" for name in ("answer_type", "question_type") if row.get(name))
    references = tuple(answer["answer"] for answer in row.get("answers") or ())
    key, image = str(row["question_id"]), str(row["image_id"])
    return Item(key, key, row["question"] + SHORT, references, row["image"], image, groups)


def baselines(items: Sequence[Item], options: SuiteOptions) -> dict[str, float]:
    """Always "yes", and the language-only model of the VQA v2 paper (arXiv 1612.00837)."""
    return {"prior": 0.2598, "published_blind": 0.4426}


VQAV2 = Benchmark(
    "vqav2", "vqav2", read, {"llava": 128, "lmms-eval": 16}, (214354, 107394), baselines=baselines
)  # fmt: skip
