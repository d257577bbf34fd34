"""Beside transformers itself (tests/parity.py)."""

import json
import os

import numpy as np
import pytest

from tests.golden import peers_answers, peers_conversations, peers_files, peers_text
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
    assert json.loads(json.dumps(peers_files.everything())) == peers_files.read()


def test_the_golden_conversations_are_what_llava_makes() -> None:
    if not {"LLAVA", "LLAVA_NEXT"} <= os.environ.keys():
        pytest.skip("LLAVA and LLAVA_NEXT name no repositories")
    assert json.loads(json.dumps(peers_conversations.all_cases())) == peers_conversations.read()
