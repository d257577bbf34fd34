"""MMBench's tables: OpenMMLab's TSV with images in base64, or lmms-lab's parquet."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vlm_jax.evaluation.benchmarks import files
from vlm_jax.evaluation.benchmarks.items import Image

_TSV = ("mmbench_dev_20230712.tsv", "mmbench_dev_en_20231003.tsv", "MMBench_DEV_EN.tsv", "mmbench_test_en_20231003.tsv")
_LAYOUTS = {"MMBench": {"rows": _TSV}, "lmms-lab": {"rows": ("en/dev-*.parquet", "data/dev-*.parquet")}}
_FIELDS = ("index", "question", "A", "B", "image")


class Table(NamedTuple):
    split: str
    layout: str
    rows: list[tuple[dict[str, Any], tuple[Image, ...], str]]  # (fields but the image, images, image id)


def read(data: Path) -> Table:
    found = files.find(data, ("mmbench", "MMBench_EN"), _LAYOUTS)
    if found.layout == "lmms-lab":
        rows = files.read_parquet(found.paths["rows"], *_FIELDS)
        return Table("dev", found.layout, [(row, row.pop("image"), str(row["index"])) for row in rows])
    path = found.path("rows")
    return Table("test" if "test" in path.name else "dev", found.layout, list(_of_tsv(path)))


def _of_tsv(path: Path) -> Iterator[tuple[dict[str, Any], tuple[Image, ...], str]]:
    rows = files.read_tsv(path, *_FIELDS)
    encoded = {row["index"]: row.pop("image") for row in rows}
    for row in rows:
        text = encoded[row["index"]]
        text = encoded.get(text, text)  # rotations may name the row that holds their image
        image = files.decode_base64(text, f"{path}: index {row['index']}")
        yield row, (image,), hashlib.sha1(image).hexdigest()[:12]


def is_missing(value: object) -> bool:
    """As pandas reads an empty cell, or as it was written by it."""
    return value is None or str(value).lower() in ("", "nan", "none")
