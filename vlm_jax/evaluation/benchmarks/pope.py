"""POPE: yes/no questions about objects in COCO images, 3,000 in each of three subsets (2,910 in LLaVA's random one)."""

from collections.abc import Sequence
from pathlib import Path

from vlm_jax.evaluation import metrics
from vlm_jax.evaluation.benchmarks import pope_files
from vlm_jax.evaluation.benchmarks.items import (
    SHORT,
    Answered,
    Benchmark,
    Item,
    Loaded,
    SuiteOptions,
    is_neither,
)
from vlm_jax.evaluation.clusters import Share


def read(data: Path, options: SuiteOptions) -> Loaded:
    layout, rows = pope_files.read(data)
    return Loaded("test", layout, [_item(row) for row in rows])


def _item(row: dict) -> Item:
    key, prompt, extra = str(row["question_id"]), row["question"].strip() + SHORT, {"subset": row["category"]}
    return Item(key, key, prompt, (row["answer"],), row["image"], str(row["image_source"]), (), extra)


def parts(answers: Sequence[Answered], options: SuiteOptions) -> list[Share]:
    """F1 = 2 TP / (answers "yes" + labels "yes") is a ratio of sums in each subset; accuracy is the plain mean."""
    if options.pope != "f1":
        chosen = [a for a in answers if options.pope == "accuracy" or a.item.extra["subset"] == "random"]
        return [Share(answer.score, 1.0, answer.item.image_id) for answer in chosen]
    out = []
    for item, text, _ in answers:
        predicted = metrics.score("pope_parse", text, [], options.flavour).lower() == "yes"
        true = item.references[0].lower() == "yes"
        out.append(Share(2.0 * (predicted and true), float(predicted + true), item.image_id, item.extra["subset"]))
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
POPE = Benchmark("pope", "pope", read, _NEW_TOKENS, (9000, 8910), is_neither, parts, sub_scores, baselines)
