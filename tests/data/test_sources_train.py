"""A mixture of a parquet file, a jsonl and a TFDS folder with weights, through two training steps."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data import traps
from tests.golden import peers_conversations, peers_text
from vlm_jax import build, job
from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve

ITEMS = {"pages": 12, "rows": 8, "kinds": 3}  # of each source


def write_sources(folder: Path) -> tuple[dict, ...]:
    """The config of three sources; an epoch has half of the first, twice the second."""
    pngs = [traps.encoded(traps.photo(number), "PNG") for number in range(3)]
    texts = [[{"user": f"What is photograph {n}?", "assistant": "A thing."}] for n in range(ITEMS["pages"])]
    images = [[{"bytes": pngs[n % 3], "path": None}] for n in range(ITEMS["pages"])]
    pq.write_table(pa.table({"images": images, "texts": texts}), folder / "pages.parquet")
    (folder / "a.png").write_bytes(pngs[0])
    lines = [
        {"image": "a.png", "prefix": f"answer en what is number {n}?", "suffix": "a bus"} for n in range(ITEMS["rows"])
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with tarfile.open(Path(__file__).parent / "fixtures" / "tfds.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    fields = (("image", "picture"), ("question", "views/about"), ("answer", "label"))
    return (
        dict(source="parquet", path=str(folder / "pages.parquet"), weight=0.5, name="pages"),
        dict(source="jsonl", path=str(folder / "rows.jsonl"), weight=2.0, name="rows"),
        dict(source="tfds", path=str(folder / "kinds"), split="train", fields=fields, name="kinds"),
    )


@pytest.mark.parametrize("alone", [None, "pages", "rows", "kinds"])
def test_two_steps(tmp_path: Path, alone: str | None) -> None:
    """The mixture draws by weight and logs a curve for each source; each source also trains alone."""
    tokenizer = peers_text.write(peers_conversations.read()["pieces"]["files"], tmp_path / "tokenizer")
    sources = [source for source in write_sources(tmp_path) if alone in (None, source["name"])]
    config = load_config("configs/vlm.py:llm=d24,tokens=4,compressor=pool,steps=2")
    config.encoder_checkpoint = ""
    config.data.train, config.data.test = tuple(sources), ()
    config.data.tokenizer, config.model.vocab = str(tokenizer), build.load_tokenizer(str(tokenizer)).size
    config.data.update(format="v1", pack="fit", batch_rows=8, row_tokens=256, row_images=4, questions_per_example=0)
    config.log_every_steps = 1
    run = build.open_run(resolve(config), tmp_path / "cache")
    (batches,) = run.train
    drawn = np.bincount([batches.data.mixture.locate(n)[0] for n in batches.epoch(0).conversation.tolist()])
    weights = {source["name"]: source.get("weight", 1.0) for source in sources}
    assert drawn.tolist() == [round(weights[name] * ITEMS[name]) for name in weights]
    job.train(run, tmp_path / "run", lambda log, values: None)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert 0 <= line["accuracy"] <= 1
        curves = {key.removeprefix("loss/"): value for key, value in line.items() if key.startswith("loss/")}
        assert set(curves) <= (set(weights) if alone is None else set())
        if alone is None:
            assert len(curves) >= 2
            assert min(curves.values()) <= line["loss"] <= max(curves.values())
