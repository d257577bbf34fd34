"""DocVQA (validation, 5,349 questions) and InfographicVQA (2,801): ANLS. Their test answers are hidden (RRC server)."""

from collections.abc import Callable
from pathlib import Path

from vlm_jax.evaluation.benchmarks import files
from vlm_jax.evaluation.benchmarks.items import SHORT, Benchmark, Item, Loaded, SuiteOptions

_LAYOUTS = {
    "docvqa": {
        "DocVQA": {
            "truth": [
                f"{folder}val_v1.0{end}.json"
                for folder in ("", "val/", "spdocvqa_qas/")
                for end in ("", "_withQT")
            ],
            "images": ("documents", "val/documents", "spdocvqa_images"),
        },
        "lmms-lab": {"rows": ("DocVQA/validation-*.parquet",)},
    },
    "infovqa": {
        "InfographicVQA": {
            "truth": [
                f"{folder}{name}.json"
                for folder in ("", "infographicsvqa_qas/")
                for name in ("infographicsVQA_val_v1.0_withQT", "infographicVQA_val_v1.0")
            ],
            "images": ("infographicsvqa_images", "images", "infographicVQA_val_v1.0_images"),
        },
        "lmms-lab": {"rows": ("InfographicVQA/validation-*.parquet",)},
    },
}  # fmt: skip
_FOLDERS = {"docvqa": ("docvqa",), "infovqa": ("infovqa", "InfographicVQA", "docvqa")}


def _reader(name: str) -> Callable[[Path, SuiteOptions], Loaded]:
    def read(data: Path, options: SuiteOptions) -> Loaded:
        found = files.find(data, _FOLDERS[name], _LAYOUTS[name])
        if found.layout == "lmms-lab":
            rows = files.read_parquet(found.paths["rows"], "questionId", "question", "answers", "image")
            rows = [
                row | {"image_id": str(row.get("docId") or row.get("image_url") or row["questionId"])} for row in rows
            ]
        else:
            rows = files.read_json(found.path("truth"))["data"]
            for row in rows:
                image = row.get("image") or row.get("image_local_name", "")
                row |= {"image": (found.path("images") / Path(image).name,), "image_id": image}
        return Loaded("validation", found.layout, [_item(row) for row in rows])

    return read


def _item(row: dict) -> Item:
    kinds = {"type": "question_types", "answer": "answer_type", "operation": "operation/reasoning"}
    groups = tuple(f"{kind}/{group}" for kind, name in kinds.items() for group in row.get(name) or ())
    key, answers = str(row["questionId"]), tuple(row.get("answers") or ())
    return Item(key, key, row["question"] + SHORT, answers, row["image"], row["image_id"], groups)


_NEW_TOKENS = {"llava": 128, "lmms-eval": 32}
DOCVQA = Benchmark("docvqa", "docvqa", _reader("docvqa"), _NEW_TOKENS, (5349,))
INFOVQA = Benchmark("infovqa", "infovqa", _reader("infovqa"), _NEW_TOKENS, (2801,))
