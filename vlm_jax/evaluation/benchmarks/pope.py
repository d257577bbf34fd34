"""POPE: yes/no questions about objects in COCO images, 3,000 in each of three subsets (LLaVA's random one has 2,910).

Labels are joined to questions by image and question, never by position: releases of the random subset have different
orders, and a wrong join gives a plausible score. Older files spell "an image" as "imange".
"""

from collections.abc import Sequence
from pathlib import Path

from vlm_jax.evaluation import metrics
from vlm_jax.evaluation.benchmarks import files
from vlm_jax.evaluation.benchmarks.items import (
    SHORT,
    Answered,
    Benchmark,
    Item,
    Loaded,
    SuiteOptions,
    says_neither,
    without,
)
from vlm_jax.evaluation.clusters import Part

_SUBSETS = ("adversarial", "popular", "random")
_LABELS = {name: (f"coco/coco_pope_{name}.json", f"coco_pope_{name}.json") for name in _SUBSETS}
_LAYOUTS = {
    "POPE": {"images": ("val2014",), **_LABELS, "llava?": ("llava_pope_test.jsonl",)},
    "lmms-lab": {"rows": ("data/test-*.parquet", "Full/*.parquet")},
}


def read(data: Path, options: SuiteOptions) -> Loaded:
    found = files.find(data, ("pope",), _LAYOUTS)
    if found.layout == "lmms-lab":
        rows = files.read_parquet(found.paths["rows"], "question_id", "question", "answer", "image", "category")
        return Loaded("test", found.layout, [_item(_numbered(row)) for row in rows])
    truth = {}
    for category in _SUBSETS:
        for row in files.read_jsonl(found.path(category), "question_id", "image", "text", "label"):
            row |= {"category": category, "question": row["text"], "answer": row["label"]}
            truth[_key(row)] = _numbered(row)
    rows = list(truth.values())
    if found.paths["llava"]:
        asked = files.read_jsonl(found.path("llava"), "question_id", "image", "text", "category")
        asked = [row | {"question": without(row["text"], SHORT)} for row in asked]
        labels = files.joined("pope", [_key(row) for row in asked], truth, found.path("random").parent)
        rows = [row | {"answer": label["answer"]} for row, label in zip(asked, labels, strict=True)]
    for row in rows:
        row |= {"image_source": row["image"], "image": (found.path("images") / row["image"],)}
    return Loaded("test", found.layout, [_item(row) for row in rows])


def _numbered(row: dict) -> dict:
    """The publisher's ids start anew in each subset."""
    return row | {"question_id": f"{row['category']}/{row['question_id']}"}


def _key(row: dict) -> tuple[str, str, str]:
    return row["category"], row["image"], row["question"].strip().replace("imange", "image")


def _item(row: dict) -> Item:
    key, prompt, extra = str(row["question_id"]), row["question"].strip() + SHORT, {"subset": row["category"]}
    return Item(key, key, prompt, (row["answer"],), row["image"], str(row["image_source"]), (), extra)


def parts(answers: Sequence[Answered], options: SuiteOptions) -> list[Part]:
    """F1 = 2 TP / (answers "yes" + labels "yes") is a ratio of sums in each subset; accuracy is the plain mean."""
    if options.pope != "f1":
        chosen = [a for a in answers if options.pope == "accuracy" or a.item.extra["subset"] == "random"]
        return [Part(answer.score, 1.0, answer.item.image_id) for answer in chosen]
    out = []
    for item, text, _ in answers:
        said = metrics.score("pope_parse", text, [], options.flavour).lower() == "yes"
        true = item.references[0].lower() == "yes"
        out.append(Part(2.0 * (said and true), float(said + true), item.image_id, item.extra["subset"]))
    return out


def sub_scores(answers: Sequence[Answered], options: SuiteOptions) -> dict[str, float]:
    """The scorer's statistics of each subset."""
    out = {}
    for subset in sorted({answer.item.extra["subset"] for answer in answers}):
        pairs = [(a.text, a.item.references[0]) for a in answers if a.item.extra["subset"] == subset]
        values = metrics.score("pope_agg", *map(list, zip(*pairs, strict=True)), options.flavour)
        out |= {f"{subset}/{name}": value for name, value in values.items()}
    return out


def baselines(items: Sequence[Item], options: SuiteOptions) -> dict[str, float]:
    return {"chance": 0.5, "always_yes": 2 / 3 if options.pope == "f1" else 0.5}


_NEW_TOKENS = {"llava": 128, "lmms-eval": 128}
POPE = Benchmark("pope", "pope", read, _NEW_TOKENS, (9000, 8910), says_neither, parts, sub_scores, baselines)
