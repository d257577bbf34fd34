"""GQA, balanced test-dev: 12,578 questions about real images (https://cs.stanford.edu/people/dorarad/gqa)."""

from collections.abc import Sequence
from pathlib import Path

from vlm_jax.evaluation.benchmarks import files
from vlm_jax.evaluation.benchmarks.items import SHORT, Benchmark, Item, Loaded, SuiteOptions

_TRUTH = "testdev_balanced_questions.json"
_LAYOUTS = {
    "GQA": {
        "truth": [f"{folder}{_TRUTH}" for folder in ("data/", "data/questions1.2/", "questions1.2/", "")],
        "images": ("data/images", "images"),
        "llava?": ("llava_gqa_testdev_balanced.jsonl",),
    },
    "lmms-lab": {
        "truth": ("testdev_balanced_instructions/testdev-*.parquet",),
        "images": ("testdev_balanced_images/testdev-*.parquet",),
    },
}  # fmt: skip


def read(data: Path, options: SuiteOptions) -> Loaded:
    found = files.find(data, ("gqa",), _LAYOUTS)
    if found.layout == "lmms-lab":
        pictures = {row["id"]: row["image"] for row in files.read_parquet(found.paths["images"], "id", "image")}
        rows = files.read_parquet(found.paths["truth"], "id", "imageId", "question", "answer")
        images = files.look_up("gqa", [row["imageId"] for row in rows], pictures, found.path("images"))
    else:
        truth = files.read_json(found.path("truth"))
        ids: Sequence[str] = list(truth)
        if found.paths["llava"]:
            ids = [str(row["question_id"]) for row in files.read_jsonl(found.path("llava"), "question_id")]
        rows = [
            row | {"id": key}
            for key, row in zip(ids, files.look_up("gqa", ids, truth, found.path("truth")), strict=True)
        ]
        images = [(found.path("images") / f"{row['imageId']}.jpg",) for row in rows]
    return Loaded(
        "testdev_balanced", found.layout, [_item(row, image) for row, image in zip(rows, images, strict=True)]
    )


def _item(row: dict, images: tuple) -> Item:
    types = row.get("types") or {}
    groups = tuple(f"{kind}/{types[kind]}" for kind in ("structural", "semantic") if types.get(kind))
    if types.get("structural"):
        groups += ("form/open" if types["structural"] == "query" else "form/binary",)
    prompt, image = row["question"] + SHORT, str(row["imageId"])
    return Item(str(row["id"]), str(row["id"]), prompt, (row["answer"],), images, image, groups)


def baselines(items: Sequence[Item], options: SuiteOptions) -> dict[str, float]:
    """The priors and the blind LSTM of the GQA paper (table 4)."""
    return {"global_prior": 0.289, "local_prior": 0.312, "published_blind": 0.4107}


GQA = Benchmark("gqa", "gqa", read, {"llava": 128, "lmms-eval": 16}, (12578,), baselines=baselines)
