"""Beside transformers itself, where it is installed: `pytest -m parity`. Elsewhere the golden file stands for it."""

import importlib.util

import numpy as np
import pytest

from tests.golden import peers_text as peers

missing = any(importlib.util.find_spec(name) is None for name in ("torch", "transformers"))
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(missing, reason="torch and transformers are not installed"),
    pytest.mark.filterwarnings("ignore"),  # the peers' own
]
CASES = peers.read()


@pytest.mark.parametrize("name", [name for name in CASES if "ids" in CASES[name]])
def test_the_golden_texts_are_what_transformers_makes(name: str, tmp_path) -> None:
    """Read from the golden file's folder, not trained again."""
    found = peers.words(lambda folder: peers.write(CASES[name]["files"], folder), name)
    assert {key: value for key, value in found.items() if key != "files"} == {
        key: value for key, value in CASES[name].items() if key != "files"
    }


@pytest.mark.parametrize("kind", ["llava", "paligemma"])
def test_the_golden_answers_are_what_transformers_says(kind: str) -> None:
    found = peers.seeing(kind)
    assert found["answers"] == CASES[kind]["answers"]
    assert found["input_ids"] == CASES[kind]["input_ids"]
    np.testing.assert_allclose(found["logits"], CASES[kind]["logits"], atol=1e-4)
