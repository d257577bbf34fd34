"""AI2D, test: 3,088 multiple-choice questions about diagrams (lmms-lab's parquet)."""

from pathlib import Path

from vlm_jax.evaluation.benchmarks import files
from vlm_jax.evaluation.benchmarks.items import LETTER, Benchmark, Item, Loaded, SuiteOptions, letter_chance, lettered
from vlm_jax.evaluation.metrics import choices

_LAYOUTS = {"lmms-lab": {"rows": ("data/test-*.parquet",)}}


def read(data: Path, options: SuiteOptions) -> Loaded:
    found = files.find(data, ("ai2d",), _LAYOUTS)
    rows = files.read_parquet(found.paths["rows"], "question", "options", "answer", "image")
    return Loaded("test", found.layout, [_item(str(number), row) for number, row in enumerate(rows)])


def _item(key: str, row: dict) -> Item:
    prompt, answer = f"{row['question']}\n{lettered(row['options'])}{LETTER}", "ABCDEFGH"[int(row["answer"])]
    return Item(key, key, prompt, (answer,), row["image"], key, (), {"options": row["options"]})


def fails(item: Item, text: str, options: SuiteOptions) -> bool:
    """The letter must be all that is left after case and punctuation."""
    letter = "".join(char for char in choices.ai2d(text).upper().strip() if char.isalnum())
    return letter not in tuple("ABCDEFGH"[: len(item.extra["options"])])


AI2D = Benchmark("ai2d", "ai2d", read, {"llava": 128, "lmms-eval": 16}, (3088,), fails, baselines=letter_chance)
