"""POPE's files: a list of labelled questions for each subset, with LLaVA's list of questions beside it, or lmms-lab's.

Labels are matched with LLaVA's questions by image and text, never by position: releases of the random subset have
different orders, and a wrong match gives a plausible score. Older files spell "an image" as "imange".
"""

from pathlib import Path

from vlm_jax.evaluation.benchmarks import files
from vlm_jax.evaluation.benchmarks.items import SHORT, without

_SUBSETS = ("adversarial", "popular", "random")
_LABELS = {name: (f"coco/coco_pope_{name}.json", f"coco_pope_{name}.json") for name in _SUBSETS}
_LAYOUTS = {
    "POPE": {"images": ("val2014",), **_LABELS, "llava?": ("llava_pope_test.jsonl",)},
    "lmms-lab": {"rows": ("data/test-*.parquet", "Full/*.parquet")},
}


def read(data: Path) -> tuple[str, list[dict]]:
    """(layout, rows with question_id, question, answer, image, image_source, category)."""
    found = files.find(data, ("pope",), _LAYOUTS)
    if found.layout == "lmms-lab":
        rows = files.read_parquet(found.paths["rows"], "question_id", "question", "answer", "image", "category")
        return found.layout, [_numbered(row) for row in rows]
    truth = {}
    for category in _SUBSETS:
        for row in files.read_jsonl(found.path(category), "question_id", "image", "text", "label"):
            row |= {"category": category, "question": row["text"], "answer": row["label"]}
            truth[_key(row)] = _numbered(row)
    rows = list(truth.values())
    if found.paths["llava"]:
        asked = files.read_jsonl(found.path("llava"), "question_id", "image", "text", "category")
        asked = [row | {"question": without(row["text"], SHORT)} for row in asked]
        labels = files.look_up("pope", [_key(row) for row in asked], truth, found.path("random").parent)
        rows = [row | {"answer": label["answer"]} for row, label in zip(asked, labels, strict=True)]
    for row in rows:
        row |= {"image_source": row["image"], "image": (found.path("images") / row["image"],)}
    return found.layout, rows


def _numbered(row: dict) -> dict:
    """The publisher's ids start anew in each subset."""
    return row | {"question_id": f"{row['category']}/{row['question_id']}"}


def _key(row: dict) -> tuple[str, str, str]:
    return row["category"], row["image"], row["question"].strip().replace("imange", "image")
