"""SEED-Bench: 14,233 questions about images and 5,009 about a frame of a video, four options each.

The official protocol ranks options by likelihood; this is the generative one of LLaVA and lmms-eval.
"""

from pathlib import Path

from vlm_jax.evaluation.benchmarks import files
from vlm_jax.evaluation.benchmarks.items import LETTER, Benchmark, Item, Loaded, SuiteOptions, letter_chance, lettered
from vlm_jax.evaluation.metrics import choices

_LAYOUTS = {
    "LLaVA": {"questions": ("llava-seed-bench.jsonl",), "truth": ("SEED-Bench.json",)},
    "lmms-lab": {"rows": ("data/test-*.parquet",)},
}
_FIELDS = ("question_id", "question", "choice_a", "choice_b", "choice_c", "choice_d", "answer", "data_type", "data_id")


def read(data: Path, options: SuiteOptions) -> Loaded:
    found = files.find(data, ("seed_bench", "SEED-Bench", "seedbench"), _LAYOUTS)
    if found.layout == "lmms-lab":
        rows = files.read_parquet(found.paths["rows"], *_FIELDS, "image")
    else:
        truth = {str(row["question_id"]): row for row in files.read_json(found.path("truth"))["questions"]}
        asked = files.read_jsonl(found.path("questions"), "question_id", "image", "text")
        matched = files.look_up("seed", [str(row["question_id"]) for row in asked], truth, found.path("truth"))
        root = found.path("questions").parent
        rows = [row | {"image": (root / old["image"],)} for old, row in zip(asked, matched, strict=True)]
    if options.seed == "image":
        rows = [row for row in rows if row["data_type"] == "image"]
    seen: dict[str, int] = {}
    items = []
    for row in rows:
        key = str(row["question_id"])
        seen[key] = seen.get(key, 0) + 1  # LLaVA's list has question 49914 twice
        items.append(_item(row, key if seen[key] == 1 else f"{key} ({seen[key]})"))
    return Loaded("test", found.layout, items)


def _item(row: dict, name: str) -> Item:
    texts = [row[f"choice_{letter}"] for letter in "abcd"]
    prompt, key = f"{row['question']}\n{lettered(texts)}{LETTER}", str(row["question_id"])
    groups = (f"data/{row['data_type']}", f"type/{row.get('question_type_id', '')}")
    return Item(name, key, prompt, (row["answer"],), row["image"], str(row["data_id"]), groups, {"options": texts})


def fails(item: Item, text: str, options: SuiteOptions) -> bool:
    return (choices.first_letter(text) if options.flavour == "lmms-eval" else text) not in tuple("ABCD")


SEED = Benchmark(
    "seed", "seed", read, {"llava": 128, "lmms-eval": 1024}, (14233, 19242, 17990), fails, baselines=letter_chance
)
