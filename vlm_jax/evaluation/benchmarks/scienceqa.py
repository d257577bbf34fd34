"""ScienceQA, test: 4,241 multiple-choice questions, 2,017 of them with an image (the usual subset)."""

from pathlib import Path
from typing import Any

from vlm_jax.evaluation.benchmarks import files
from vlm_jax.evaluation.benchmarks.items import LETTER, Benchmark, Item, Loaded, SuiteOptions, letter_chance, lettered
from vlm_jax.evaluation.metrics import choices

_TRUTH = {
    "problems": ("problems.json", "data/scienceqa/problems.json"),
    "splits": ("pid_splits.json", "data/scienceqa/pid_splits.json"),
}
_LAYOUTS = {
    "LLaVA": {"questions": ("llava_test_CQM-A.json",), "images?": ("images/test", "test"), **_TRUTH},
    "ScienceQA": {"images": ("images/test", "test"), **_TRUTH},
    "lmms-lab": {"rows": ("ScienceQA-FULL/test-*.parquet", "ScienceQA-IMG/test-*.parquet", "data/test-*.parquet")},
}  # fmt: skip


def read(data: Path, options: SuiteOptions) -> Loaded:
    found = files.find(data, ("scienceqa",), _LAYOUTS)
    if found.layout == "lmms-lab":
        rows = files.read_parquet(found.paths["rows"], "image", "question", "choices", "answer", "hint")
        items = [_item(str(number), row, row["image"], _prompt(row)) for number, row in enumerate(rows)]
        return Loaded("test", found.layout, _chosen(items, options))
    problems = files.read_json(found.path("problems"))
    ids = [str(key) for key in files.read_json(found.path("splits"))["test"]]
    rows = files.look_up("scienceqa", ids, problems, found.path("problems"))
    folder = (found.paths["images"] or [found.path("problems").parent / "images" / "test"])[0]
    images = [(folder / key / row["image"],) if row.get("image") else () for key, row in zip(ids, rows, strict=True)]
    prompts = [_prompt(row) for row in rows]
    if found.layout == "LLaVA":
        asked = {str(row["id"]): row for row in files.read_jsonl(found.path("questions"), "id", "conversations")}
        given = files.look_up("scienceqa", ids, asked, found.path("questions"))
        prompts = [row["conversations"][0]["value"].replace("<image>", "").strip() + LETTER for row in given]
        images = [(folder / row["image"],) if row.get("image") else () for row in given]
    items = [_item(*parts) for parts in zip(ids, rows, images, prompts, strict=True)]
    return Loaded("test", found.layout, _chosen(items, options))


def _chosen(items: list[Item], options: SuiteOptions) -> list[Item]:
    return [item for item in items if item.images] if options.scienceqa == "image" else items


def _prompt(row: dict[str, Any]) -> str:
    context = f"Context: {row['hint']}\n" if row.get("hint") else ""
    return f"{context}{row['question']}\n{lettered(row['choices'])}{LETTER}"


def _item(key: str, row: dict[str, Any], images: tuple, prompt: str) -> Item:
    groups = tuple(f"{name}/{row[name]}" for name in ("subject", "grade") if row.get(name))
    groups += ("context/image" if images else "context/text",)
    answer, count = "ABCDE"[row["answer"]], len(row["choices"])
    return Item(key, key, prompt, (answer,), images, key, groups, {"choices": count, "options": row["choices"]})


def fails(item: Item, text: str, options: SuiteOptions) -> bool:
    if options.flavour == "lmms-eval":
        return choices.scienceqa_lenient(text) is None
    return choices.scienceqa(text, item.extra["choices"]) is None


SCIENCEQA = Benchmark(
    "scienceqa", "scienceqa", read, {"llava": 1024, "lmms-eval": 16}, (2017, 4241), fails, baselines=letter_chance
)
