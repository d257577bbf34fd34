"""ChartQA, test: 1,250 questions that people wrote and 1,250 that were generated."""

from pathlib import Path

from vlm_jax.evaluation.benchmarks import files
from vlm_jax.evaluation.benchmarks.items import SHORT, Benchmark, Item, Loaded, SuiteOptions

_ROOTS = ("test", "ChartQA Dataset/test", "ChartQA_Dataset/test")
_LAYOUTS = {
    "ChartQA": {
        "human": [f"{root}/test_human.json" for root in _ROOTS],
        "augmented": [f"{root}/test_augmented.json" for root in _ROOTS],
        "images": [f"{root}/png" for root in _ROOTS],
    },
    "lmms-lab": {"rows": ("data/test-*.parquet",)},
}
_SINGLE_WORD = "\nAnswer the question with a single word."


def read(data: Path, options: SuiteOptions) -> Loaded:
    found = files.find(data, ("chartqa",), _LAYOUTS)
    if found.layout == "lmms-lab":
        rows = files.read_parquet(found.paths["rows"], "question", "answer", "image", "type")
        rows = [row | {"image_id": str(number)} for number, row in enumerate(rows)]
    else:
        rows = []
        for kind in ("human", "augmented"):
            for row in files.read_jsonl(found.path(kind), "imgname", "query", "label"):
                image, name = (found.path("images") / row["imgname"],), row["imgname"]
                old = {"question": row["query"], "answer": row["label"], "type": kind}
                rows.append(old | {"image": image, "image_id": name})
    return Loaded("test", found.layout, [_item(str(number), row, options) for number, row in enumerate(rows)])


def _item(key: str, row: dict, options: SuiteOptions) -> Item:
    prompt = row["question"] + (SHORT if options.prompt == "llava" else _SINGLE_WORD)
    groups = (f"split/{row['type'].removesuffix('_test')}",)
    return Item(key, key, prompt, (row["answer"],), row["image"], row["image_id"], groups)


CHARTQA = Benchmark("chartqa", "chartqa", read, {"llava": 128, "lmms-eval": 16}, (2500,))
