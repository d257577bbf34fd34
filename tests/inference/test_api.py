"""Loaded folders answer as transformers does (peers_answers, peers_decoders), and alone as in any batch."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import vlm_jax
from tests.golden import peers_answers, peers_decoders, peers_text
from tests.golden.drawn import weights
from vlm_jax.core.errors import UserError
from vlm_jax.data.rows import bucket
from vlm_jax.inference import programs

CASES = peers_answers.read()
DECODERS = peers_decoders.read()
SEEING = ("llava", "paligemma")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, vlm_jax.Model]:
    place, out = tmp_path_factory.mktemp("models"), {}
    for name in SEEING:
        folder = peers_text.write(CASES[name]["files"], place / name)
        save_file(weights(CASES[name]["shapes"]), folder / "model.safetensors")
        out[name] = vlm_jax.load(folder)
    return out


def as_floats(name: str, model: vlm_jax.Model) -> np.ndarray:
    """The pictures as the reference's processor leaves them, channels last."""
    spec = model.spec.encoder
    return ((peers_answers.pictures() / 255 - np.array(spec.pixel_mean)) / np.array(spec.pixel_std)).astype(np.float32)


@pytest.mark.parametrize("name", SEEING)
def test_answers_are_the_references(models: dict[str, vlm_jax.Model], name: str) -> None:
    """64 tokens, greedy, prompts of different lengths in one batch: from the bare question and from the whole text."""
    case, model, pictures = CASES[name], models[name], list(peers_answers.pictures())
    wanted = case["answers"]
    assert len(set(wanted)) == 3  # three times the same text would prove little
    assert vlm_jax.generate(model, pictures, peers_answers.QUESTIONS, peers_answers.NEW_TOKENS) == wanted
    (alone,) = vlm_jax.generate(model, pictures[1:2], case["asked"][1:2], peers_answers.NEW_TOKENS)
    assert alone == wanted[1]


@pytest.mark.parametrize("name", SEEING)
def test_logits_are_the_references(models: dict[str, vlm_jax.Model], name: str) -> None:
    """Of the last token of left-padded rows; padding is found by the pad id or given as a mask."""
    case, model = CASES[name], models[name]
    tokens, mask = np.array(case["input_ids"]), np.array(case["mask"])
    pixels = as_floats(name, model)
    for given in (None, mask):
        found = vlm_jax.forward(model, pixels, tokens, given)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found[:, -1], case["logits"], atol=3e-5)
    width = tokens.shape[1]
    right = np.array([[*row[:0], *row[pad:], *row[:pad]] for row, pad in zip(tokens, width - mask.sum(1), strict=True)])
    found = vlm_jax.forward(model, pixels, right)
    np.testing.assert_allclose(found[np.arange(3), mask.sum(1) - 1], case["logits"], atol=3e-5)


def test_a_pad_id_that_ends_answers_is_no_padding(models: dict[str, vlm_jax.Model]) -> None:
    """Without a mask, the end token behind a row is read, as under a mask of ones."""
    model = models["llava"]._replace(pad=2, eos_ids=(2,))
    rows = np.array([[5, 6, 7, 2]])
    found, wanted = vlm_jax.forward(model, None, rows), vlm_jax.forward(model, None, rows, np.ones_like(rows))
    np.testing.assert_array_equal(found, wanted)
    assert np.abs(found - vlm_jax.forward(model, None, rows, [[1, 1, 1, 0]]))[0, 3].max() > 1e-3


@pytest.mark.parametrize("name", ["gemma2", "qwen2_window"])
def test_a_language_model_alone(name: str, tmp_path: Path) -> None:
    """Windows, softcaps and padding on the left, over 64 tokens; a folder without a tokenizer takes ids."""
    case = DECODERS[name]
    save_file(weights(case.shapes), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    model = vlm_jax.load(tmp_path)
    tokens, real = peers_decoders.left_padded()
    found = vlm_jax.generate_tokens(model, None, tokens, peers_decoders.NEW_TOKENS, mask=real)
    np.testing.assert_array_equal(found, case.greedy)
    with pytest.raises(UserError, match="without a tokenizer"):
        vlm_jax.generate(model, None, ["hello"])


def test_drawn_answers_follow_the_seed(models: dict[str, vlm_jax.Model]) -> None:
    model, pictures = models["llava"], list(peers_answers.pictures())
    one, again, other = (
        vlm_jax.generate(model, pictures, peers_answers.QUESTIONS, peers_answers.NEW_TOKENS, temperature=1.0, seed=seed)
        for seed in (1, 1, 2)
    )
    assert one == again != other


def test_buckets_are_few_and_close() -> None:
    lengths = np.arange(1, 3000)
    sizes = np.array([bucket(int(n)) for n in lengths])
    assert np.all(sizes >= lengths)
    assert np.all(sizes[lengths > 16] < 1.5 * lengths[lengths > 16])
    assert len(set(sizes)) < 20


def test_invalid_inputs_raise_before_anything_runs(models: dict[str, vlm_jax.Model]) -> None:
    model, case = models["llava"], CASES["llava"]
    tokens, pixels = np.array(case["input_ids"]), as_floats("llava", models["llava"])
    one_less = np.where(np.cumsum(tokens == model.image_token, axis=1) == 1, 5, tokens)
    long = np.full((1, 300), 5)
    for message, images, rows in (
        ("row 0: expected 9 image placeholders .* got 8", pixels, one_less),
        ("row 0: expected 0 image placeholders .* no images", None, tokens),
        ("images: expected one entry for each of 3 rows, got 2", pixels[:2], tokens),
        ("row 1: expected ids below the vocabulary", pixels, np.where(np.arange(3)[:, None] == 1, 400, tokens)),
        (
            "row 2: expected a token, got padding alone",
            None,
            np.where(np.arange(3)[:, None] == 2, model.pad, 5) + tokens * 0,
        ),
        ("tokens: expected integers of shape", None, tokens[0]),
        ("300 tokens is longer than the model's context of 256", None, long),
    ):
        with pytest.raises(UserError, match=message):
            vlm_jax.generate_tokens(model, images, rows)
    for message, images, prompts in (
        ("one entry for each of 3 rows, got 2", list(peers_answers.pictures()[:2]), peers_answers.QUESTIONS),
        ("expected a list of texts", None, "What?"),
        (r"images\[0\]: expected", [np.zeros((3, 3))], ["What?"]),
    ):
        with pytest.raises(UserError, match=message):
            vlm_jax.generate(model, images, prompts)
    for message, prompts in (
        ("prompt: expected a string", [3]),
        ("prompt: expected a string", [[]]),
        ("prompt: expected a string", [[3]]),
        ("expected a list of texts", 3),
    ):
        with pytest.raises(UserError, match=message):
            vlm_jax.generate(model, None, prompts)
    with pytest.raises(UserError, match="300 tokens is longer than the model's context of 256"):
        vlm_jax.forward(model, None, long)
    for message, images, rows in (
        (r"images\[1\]: expected a path, a PIL image", [pixels[0], 3, pixels[0]], tokens),
        ("images: expected one entry", [pixels[0]], tokens),
        (r"images\[0\]: expected finite pixels", np.full_like(pixels, np.nan), tokens),
        ("tokens: expected an array", None, [[1], [2, 3]]),
    ):
        with pytest.raises(UserError, match=message):
            vlm_jax.forward(model, images, rows)
    for many in (0, 256, 10**9, 10**10):
        with pytest.raises(UserError, match=r"expected 1 to 255 after a prompt of 1 tokens"):
            vlm_jax.generate_tokens(model, None, [[5]], many)
    for seed in (2**70, -1):
        with pytest.raises(UserError, match="seed"):
            vlm_jax.generate_tokens(model, None, [[5]], seed=seed)
    with pytest.raises(UserError, match="temperature"):
        vlm_jax.generate_tokens(model, None, [[5]], temperature=-1.0)


def test_a_temperature_that_is_nearly_none_is_none(models: dict[str, vlm_jax.Model]) -> None:
    cold, greedy = (vlm_jax.generate_tokens(models["llava"], None, [[5, 6]], 8, heat) for heat in (1e-50, 0.0))
    np.testing.assert_array_equal(cold, greedy)


def test_prompts_of_a_bucket_share_their_programs(models: dict[str, vlm_jax.Model]) -> None:
    """What is asked, its length within the bucket, and how long the answer may be compile nothing anew."""
    model, rng = models["llava"], np.random.default_rng(0)
    config, counts = (model.spec, model.compute, model.plan), []
    for length, new in ((17, 9), (20, 12), (24, 16)):
        tokens = rng.integers(5, 30, (2, length))
        vlm_jax.forward(model, None, tokens)
        vlm_jax.generate_tokens(model, None, tokens, new)
        compiled = (
            programs.hidden_program(*config),
            programs.prefill_program(*config, 16),
            programs.start_program(*config, model.eos_ids, 16, "greedy"),
            programs.decode_program(*config, model.eos_ids, "greedy"),
        )
        counts.append([program._cache_size() for program in compiled])
    assert counts[0] == counts[1] == counts[2]
    assert min(counts[0]) > 0
