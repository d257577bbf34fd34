"""Packing with the rows of configs/llava.py; the benchmark's page shows its rows."""

import json

import pytest

from experiments.data_speed import packing


@pytest.fixture(scope="module")
def mixture():
    return packing.drawn(3_000)


@pytest.mark.parametrize("tokens", packing.TOKENS)
def test_rows_of_the_recipe_are_full(mixture, tokens: int) -> None:
    """At most 5 % padding for texts of LLaVA's lengths; at V = 16 a sixth of the FLOPs of one conversation a row."""
    found = packing.measure(tokens, mixture, ["qwen1.5-7b"])
    assert found["fit"]["fill"] >= 0.95
    if tokens == 16:
        packed, one_a_row = (found[pack]["epoch_flops"]["qwen1.5-7b"] for pack in ("fit", "none"))
        assert one_a_row >= 6 * packed


def test_the_page_is_that_of_its_rows() -> None:
    result = json.loads((packing.HERE / "packing.json").read_text())
    assert packing.table(result) in (packing.HERE / "README.md").read_text()
