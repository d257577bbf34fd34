"""The source of experiments/easy_vqa on a small copy of its layout, and accuracy by kind of question."""

import json
import math
from pathlib import Path

import pytest

from experiments.easy_vqa import scores, source
from vlm_jax.core.errors import UserError
from vlm_jax.data.examples import Turn

QUESTIONS = [
    ["what color is the shape?", "blue", 0],
    ["is there a circle?", "yes", 0],
    ["what shape is present?", "circle", 0],
    ["is there a circle?", "no", 2],
    ["what shape is present?", "rectangle", 2],
]


@pytest.fixture
def easy_vqa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for split in source.SPLITS:
        (tmp_path / split).mkdir()
        (tmp_path / split / "questions.json").write_text(json.dumps(QUESTIONS))
    monkeypatch.setattr(source, "folder", lambda: tmp_path)
    return tmp_path


def test_an_item_is_an_image_with_all_of_its_questions(easy_vqa: Path) -> None:
    found = source.EasyVqa("train", system="Answer.")
    assert len(found) == 2
    assert found[1].images == (easy_vqa / "train" / "images" / "2.png",)
    assert found[1].turns == (
        Turn("system", "Answer."),
        Turn("user", "is there a circle?"),
        Turn("assistant", "no"),
        Turn("user", "what shape is present?"),
        Turn("assistant", "rectangle"),
    )
    assert source.EasyVqa("train")[0].turns[0] == Turn("user", "what color is the shape?")
    with pytest.raises(UserError, match="unknown split 'dev'"):
        source.EasyVqa("dev")


def test_captions_are_of_images_whose_colour_and_shape_are_known(easy_vqa: Path) -> None:
    (caption,) = source.Captions("train")
    assert caption.turns == (Turn("user", "<image>"), Turn("assistant", " blue circle"))
    assert caption.images == source.EasyVqa("train")[0].images


def test_accuracy_by_kind_has_errors_over_images(easy_vqa: Path) -> None:
    """Two images with one of three and both of two right: r = 3/5, se^2 = 2 ((1 - 9/5)^2 + (2 - 6/5)^2) / 25."""
    asked = scores.questions(source.EasyVqa("test"))
    assert [(q.image, q.answer) for q in asked] == [(0, "blue"), (0, "yes"), (0, "circle"), (1, "no"), (1, "rectangle")]
    found = scores.by_kind(asked, [0, 1, 0, 1, 1])
    assert found["all"] == pytest.approx((3 / 5, math.sqrt(2 * (0.8**2 + 0.8**2) / 25)))
    assert found["yes or no"][0] == 1.0
    assert found["shape"][0] == 0.5
    baselines = scores.baselines(asked)
    assert baselines["question alone"]["colour"][0] == 1.0
    assert "| question alone |" in scores.table(baselines)
