"""TextVQA, validation 0.5.1: 5,000 questions. With `ocr_tokens="given"`, the prompt lists the strings that an OCR
system read, as LLaVA's does; scores with and without do not compare.
"""

from pathlib import Path

from vlm_jax.core.errors import UserError
from vlm_jax.evaluation.benchmarks import files
from vlm_jax.evaluation.benchmarks.items import SHORT, Benchmark, Item, Loaded, SuiteOptions, without

_TRUTH = ("TextVQA_0.5.1_val.json",)
_LAYOUTS = {
    "LLaVA": {
        "questions": ("llava_textvqa_val_v051_ocr.jsonl",),
        "truth": _TRUTH,
        "images": ("train_images", "train_val_images/train_images"),
    },
    "lmms-lab": {"rows": ("data/validation-*.parquet",)},
    "TextVQA": {"truth": _TRUTH, "images": ("train_images", "train_val_images/train_images")},
}
_OCR = "Reference OCR token:"


def read(data: Path, options: SuiteOptions) -> Loaded:
    found = files.find(data, ("textvqa",), _LAYOUTS)
    if found.layout == "lmms-lab":
        rows = files.read_parquet(found.paths["rows"], "image_id", "question_id", "question", "image", "answers")
    else:
        rows = files.read_json(found.path("truth"))["data"]
        for row in rows:
            row["image"] = (found.path("images") / f"{row['image_id']}.jpg",)
    if found.layout == "LLaVA":
        rows = _with_llava_tokens(found, rows)
    if options.ocr_tokens == "given" and "ocr_tokens" not in rows[0]:
        raise UserError(
            f"textvqa: ocr_tokens=given: {found.path('truth').parent} has none: add {_LAYOUTS['LLaVA']['questions'][0]}"
        )
    return Loaded("validation", found.layout, [_item(row, options) for row in rows])  # fmt: skip


def _with_llava_tokens(found: files.Found, rows: list[dict]) -> list[dict]:
    """LLaVA matches its prompts with the truth by (image, question in lower case)."""
    truth = {(row["image_id"], row["question"].lower()): row for row in rows}
    prompts = files.read_jsonl(found.path("questions"), "question_id", "text")
    lines = [without(row["text"], SHORT).split("\n") for row in prompts]
    keys = [(row["question_id"], parts[0].lower()) for row, parts in zip(prompts, lines, strict=True)]
    matched = files.look_up("textvqa", keys, truth, found.path("truth"))
    tokens = [parts[1].removeprefix(_OCR).strip() if len(parts) > 1 else "" for parts in lines]
    return [row | {"ocr_tokens": [text] if text else []} for row, text in zip(matched, tokens, strict=True)]


def _item(row: dict, options: SuiteOptions) -> Item:
    tokens = f"\n{_OCR} {', '.join(row['ocr_tokens'])}" if options.ocr_tokens == "given" else ""
    prompt, image = row["question"].capitalize() + tokens + SHORT, str(row["image_id"])
    # LLaVA's answers carry the image's id as question_id.
    key = image if options.prompt == "llava" else str(row["question_id"])
    return Item(str(row["question_id"]), key, prompt, tuple(row["answers"]), row["image"], image)


TEXTVQA = Benchmark("textvqa", "textvqa", read, {"llava": 128, "lmms-eval": 1024}, (5000,))
