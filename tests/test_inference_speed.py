"""The benchmarks' page shows their rows, and a new measurement replaces the old one."""

import json
from pathlib import Path

import pytest

from experiments.inference_speed import measuring, serial_share

PEERS = ("transformers", "big_vision")


@pytest.mark.parametrize("peer", PEERS)
def test_the_page_is_that_of_its_rows(peer: str) -> None:
    rows = json.loads((measuring.HERE / f"beside_{peer}.json").read_text())
    assert measuring.table(rows, peer) in (measuring.HERE / "README.md").read_text()


def test_the_page_has_the_serial_shares() -> None:
    rows = json.loads(serial_share.FILE.read_text())
    assert serial_share.table(rows) in (measuring.HERE / "README.md").read_text()


def test_an_operation_without_a_product_inside_is_serial() -> None:
    text = """HloModule m

%copying (p: f32[4]) -> f32[4] {
  ROOT %c = f32[4]{0} copy(%p)
}

%multiplying (p: f32[4,4], q: f32[4,4]) -> f32[4,4] {
  ROOT %d = f32[4,4]{1,0} dot(%p, %q), lhs_contracting_dims={1}
}

%body (s: (f32[4])) -> (f32[4]) {
  %dot.1 = f32[1,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}
  %copy_fusion.2 = f32[4]{0} fusion(%a), kind=kLoop, calls=%copying
  ROOT %ynn_fusion.3 = f32[4,4]{1,0} fusion(%a, %b), kind=kCustom, calls=%multiplying
}

ENTRY %main (s: (f32[4])) -> (f32[4]) {
  ROOT %while = (f32[4]) while(%s), condition=%test, body=%body
}
"""
    assert serial_share.serial_operations(text) == {"dot.1": False, "copy_fusion.2": True, "ynn_fusion.3": False}


def test_times_of_operations_count_by_their_medians() -> None:
    """Three tokens of a product of 6 us, a gap of 1 and a copy of 3; the second is interrupted for 100."""
    loop = serial_share.Loop(None, {"dot": False, "copy": True})
    events = [(0, 6, "dot"), (7, 3, "copy"), (10, 106, "dot"), (117, 3, "copy"), (120, 6, "dot"), (127, 3, "copy")]
    events = [(1000 * start, 1000 * length, name) for start, length, name in events]
    found = serial_share.shares([*events, (130_000, 6_000, "dot"), (137_000, 3_000, "copy")], loop.serial, warm=0)
    assert found["products_ms"] == 0.006
    assert found["rest_ms"] == 0.004
    assert found["serial_share"] == 0.4


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
