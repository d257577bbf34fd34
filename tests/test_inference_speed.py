"""The benchmarks' page shows their rows, and a new measurement replaces the old one."""

import json
from pathlib import Path

import pytest

from experiments.inference_speed import measuring

PEERS = ("transformers", "big_vision")


@pytest.mark.parametrize("peer", PEERS)
def test_the_page_is_that_of_its_rows(peer: str) -> None:
    rows = json.loads((measuring.HERE / f"beside_{peer}.json").read_text())
    assert measuring.table(rows, peer) in (measuring.HERE / "README.md").read_text()


def test_a_row_replaces_the_one_of_the_same_model_cores_and_batch(tmp_path: Path) -> None:
    kept = json.loads((measuring.HERE / "beside_transformers.json").read_text())
    first, file = kept[0], tmp_path / "rows.json"
    for row in kept:
        measuring.keep(file, row)
    again, other = {**first, "prefill_ms": 1.0}, {**first, "threads": first["threads"] + 100}
    measuring.keep(file, other)
    rows = measuring.keep(file, again)
    assert len(rows) == len(kept) + 1
    assert [again in rows, other in rows, first in rows] == [True, True, False]
    assert rows == json.loads(file.read_text())
