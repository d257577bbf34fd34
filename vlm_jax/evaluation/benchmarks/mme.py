"""MME: 2,374 yes/no questions, two about each image, in 14 subtasks of at most 200 points."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from vlm_jax.core.errors import UserError
from vlm_jax.evaluation.benchmarks import files, mme_files
from vlm_jax.evaluation.benchmarks.items import SHORT, Answered, Benchmark, Item, Loaded, SuiteOptions, is_neither
from vlm_jax.evaluation.clusters import Share
from vlm_jax.evaluation.metrics.yes_no import COGNITION, PERCEPTION

_ROOT = "MME_Benchmark_release_version"
_LAYOUTS = {
    "MME": {"tree": (f"{_ROOT}/MME_Benchmark", _ROOT, "MME_Benchmark"), "llava?": ("llava_mme.jsonl",)},
    "lmms-lab": {"rows": ("data/test-*.parquet",)},
}


def read(data: Path, options: SuiteOptions) -> Loaded:
    found = files.find(data, ("mme",), _LAYOUTS)
    if found.layout == "lmms-lab":
        rows = files.read_parquet(found.paths["rows"], "question_id", "image", "question", "answer", "category")
    else:
        tree = mme_files.read(found.path("tree"))
        rows = list(tree.values())
        if found.paths["llava"]:
            asked = files.read_jsonl(found.path("llava"), "question_id", "text")
            keys = [mme_files.key(row["question_id"], row["text"]) for row in asked]
            pairs = zip(asked, files.look_up("mme", keys, tree, found.path("tree")), strict=True)
            rows = [row | {"question_id": old["question_id"]} for old, row in pairs]
    count: dict[str, int] = {}
    items = []
    for row in rows:
        number = count[row["question_id"]] = count.get(row["question_id"], 0) + 1
        items.append(_item(row, number, options))
    if odd := [key for key in count if count[key] != 2]:
        raise UserError(f"mme: expected 2 questions an image, got {count[odd[0]]} about {odd[0]}")
    return Loaded("test", found.layout, items)


def _item(row: dict, number: int, options: SuiteOptions) -> Item:
    key, question = row["question_id"], row["question"].strip().replace(f" {mme_files.YES_NO}", "")
    prompt = (question.strip() if options.prompt == "llava" else question) + SHORT  # some have two spaces before it
    return Item(f"{key}#{number}", key, prompt, (row["answer"],), row["image"], key, (), {"task": row["category"]})


def parts(answers: Sequence[Answered], options: SuiteOptions) -> list[Share]:
    """An image adds (acc + acc_plus) / 2 to its subtask; the mean of ten subtasks is P / 2000, of 14 (P + C) / 2800."""
    tasks = PERCEPTION if options.mme == "perception" else PERCEPTION + COGNITION
    images: dict[tuple[str, str], list[float]] = {}
    for item, _, score in answers:
        if item.extra["task"] in tasks:
            images.setdefault((item.extra["task"], item.image_id), []).append(score)
    pairs = {name: hits for name, hits in images.items() if len(hits) == 2}  # a limit may cut a pair
    return [Share((sum(hits) / 2 + min(hits)) / 2, 1.0, image, task) for (task, image), hits in pairs.items()]


def sub_scores(answers: Sequence[Answered], options: SuiteOptions) -> dict[str, float]:
    """Points: at most 200 a subtask, 2000 perception, 800 cognition."""
    points: dict[str, list[float]] = {}
    for part in parts(answers, dataclasses.replace(options, mme="all")):
        points.setdefault(str(part.stratum), []).append(200 * part.value)
    tasks = {task: sum(values) / len(values) for task, values in points.items()}
    totals = {"perception": PERCEPTION, "cognition": COGNITION}
    return {name: sum(tasks.get(task, 0.0) for task in names) for name, names in totals.items()} | tasks


def baselines(items: Sequence[Item], options: SuiteOptions) -> dict[str, float]:
    """Of 200 points, random answers have 75 and "yes" 50."""
    return {"chance": 0.375, "always_yes": 0.25}


MME = Benchmark("mme", "mme", read, {"llava": 128, "lmms-eval": 16}, (2374,), is_neither, parts, sub_scores, baselines)
