"""MathVista, testmini: 1,000 questions, asked in lmms-eval's direct format.

The official pipeline has a GPT model extract the answer from the response; no model is called here, so responses that
are more than the answer count as they are (`fails` gives the share).

lmms-eval allows 16,384 new tokens, for which a cache is reserved; as the prompt asks for the answer alone, 1,024 are
allowed here (`--set new_tokens=16384`).
"""

from collections.abc import Sequence
from pathlib import Path

from vlm_jax.evaluation.benchmarks import files
from vlm_jax.evaluation.benchmarks.items import LETTER, Benchmark, Item, Loaded, SuiteOptions, lettered
from vlm_jax.evaluation.metrics import text as free_form

_LAYOUTS = {"MathVista": {"rows": ("data/testmini-*.parquet", "testmini-*.parquet")}}
_FIELDS = ("pid", "question", "decoded_image", "choices", "answer", "question_type", "answer_type", "precision", "unit")
_HINTS = {
    "integer": "Answer the question using a single integer number.",
    "float": "Answer the question using a single floating-point number with {} decimal place{}.",
    "list": "Answer the question using a Python list.",
}


def read(data: Path, options: SuiteOptions) -> Loaded:
    found = files.find(data, ("mathvista",), _LAYOUTS)
    return Loaded("testmini", found.layout, [_item(row) for row in files.read_parquet(found.paths["rows"], *_FIELDS)])


def _item(row: dict) -> Item:
    question = row["question"] + (f" (Unit: {row['unit']})" if row["unit"] else "")
    hint = LETTER.strip() if row["question_type"] == "multi_choice" else _HINTS[row["answer_type"]]
    if row["answer_type"] == "float":
        hint = hint.format("one", "") if int(row["precision"]) == 1 else hint.format("two", "s")
    prompt = "\n".join(part for part in (question, lettered(row["choices"] or ()), hint) if part).strip()
    extra = {name: row[name] for name in ("choices", "question_type", "answer_type", "precision")}
    metadata, key = row.get("metadata") or {}, str(row["pid"])
    groups = tuple(f"{name}/{metadata[name]}" for name in ("task", "category") if metadata.get(name))
    groups += tuple(f"skill/{skill}" for skill in metadata.get("skills") or ())
    image = str(row.get("image") or key)
    return Item(key, key, prompt, (row["answer"],), row["decoded_image"], image, groups, extra)


def fails(item: Item, text: str, options: SuiteOptions) -> bool:
    """Not a choice or its letter, or not the kind of number that is asked for."""
    extra = item.extra
    if extra["question_type"] == "multi_choice":
        letters = ("ABCDEFGH"[i] for i in range(len(extra["choices"])))
        return text.strip() not in (*extra["choices"], *letters)
    return not text.strip() or free_form.mathvista_answer(text, **extra) is None


def baselines(items: Sequence[Item], options: SuiteOptions) -> dict[str, float]:
    """Random chance (MathVista's README)."""
    return {"chance": 0.179}


MATHVISTA = Benchmark(
    "mathvista", "mathvista", read, {"llava": 1024, "lmms-eval": 1024}, (1000,), fails, baselines=baselines
)
