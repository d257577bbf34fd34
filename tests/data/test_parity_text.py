"""Beside transformers itself (tests/parity.py)."""

import json

import numpy as np
import pytest

from tests.golden import peers_answers, peers_files, peers_text
from tests.parity import MARKS, with_transformers

pytestmark = [*MARKS, with_transformers]
TEXTS, ANSWERS = peers_text.read(), peers_answers.read()


@pytest.mark.parametrize("name", TEXTS)
def test_the_golden_texts_are_what_transformers_makes(name: str) -> None:
    """Files and all: the tokenizers are made anew, letter for letter."""
    assert peers_text.words(peers_text.folders()[name]) == TEXTS[name]


@pytest.mark.parametrize("kind", peers_answers.MODELS)
def test_the_golden_answers_are_what_transformers_says(kind: str) -> None:
    found, golden = peers_answers.answer(kind), ANSWERS[kind]
    assert found["answers"] == golden["answers"]
    assert found["input_ids"] == golden["input_ids"]
    np.testing.assert_allclose(found["logits"], golden["logits"], atol=1e-4)


def test_the_golden_choices_of_files_are_what_transformers_makes() -> None:
    golden = peers_files.read()
    assert json.loads(json.dumps(peers_files.all_templates())) == golden["templates"]
    assert json.loads(json.dumps(peers_files.all_begin_end())) == golden["begin_end"]
