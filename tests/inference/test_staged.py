"""Models that visual tokens leave, from a folder to a text: rows of a batch answer as if alone."""

from pathlib import Path

import numpy as np
import pytest

import vlm_jax
from tests.golden import peers_answers, peers_text
from tests.golden.drawn import weights
from vlm_jax.core.errors import UserError
from vlm_jax.inference import api, token_maps

CASE = peers_answers.read()["llava"]
SHORT, LONG = "USER: <image>\nWhat is this? ASSISTANT:", "USER: " + "one two three four five six " * 3 + "ASSISTANT:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.numpy import save_file

    out = peers_text.write(CASE["files"], tmp_path_factory.mktemp("llava") / "llava")
    save_file(weights(CASE["shapes"]), out / "model.safetensors")
    return out


@pytest.mark.parametrize("compressor", ["fastv", "voco"])
def test_rows_of_a_batch_answer_as_if_alone(folder: Path, compressor: str) -> None:
    """One has an image, the other a longer text and none, which loses no word at a stage."""
    model = vlm_jax.load(folder, compressor=compressor, tokens=4, seed=0)
    image = peers_answers.pictures()[0]
    both = vlm_jax.generate(model, [image, None], [SHORT, LONG], max_new_tokens=4)
    alone = [vlm_jax.generate(model, *row, max_new_tokens=4)[0] for row in (([image], [SHORT]), (None, [LONG]))]
    assert both == alone


def test_the_picture_matters(folder: Path) -> None:
    model = vlm_jax.load(folder, compressor="fastv", tokens=4)
    pictures = peers_answers.pictures()[:2]
    tokens = [[model.image_token] * model.visual_tokens + model.tokenizer.encode("what is this?")] * 2
    logits = np.asarray(vlm_jax.forward(model, pictures, np.array(tokens)))
    assert np.abs(logits[0, -1] - logits[1, -1]).max() > 1e-4


@pytest.mark.parametrize(("compressor", "tokens"), [("m3", 3), ("vision_zip", 4), ("llava_mini", 4)])
def test_every_kind_of_evidence_comes_with_a_folder(folder: Path, compressor: str, tokens: int) -> None:
    """And its token maps: shares that sum to one."""
    model = vlm_jax.load(folder, compressor=compressor, tokens=tokens, seed=0)
    image = peers_answers.pictures()[:1]
    question = np.array([api.question_ids(model, "what is this?")])
    shares = token_maps.patch_shares(model, image.astype(np.float32) / 255, np.arange(1, 3), question)
    np.testing.assert_allclose(shares.sum((1, 2)), 1, rtol=1e-4)
    assert vlm_jax.generate(model, list(image), [SHORT], max_new_tokens=2)


def test_a_v_that_cannot_be_is_one_line(folder: Path) -> None:
    with pytest.raises(UserError, match=r"'fastv' cannot give tokens=9 on a 3 x 3 patch grid; possible: 1, 2, "):
        vlm_jax.load(folder, compressor="fastv", tokens=9)
    with pytest.raises(UserError, match="unknown compressor 'fast_v': did you mean 'fastv'"):
        vlm_jax.load(folder, compressor="fast_v", tokens=4)
