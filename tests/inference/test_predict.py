"""The door that answers, on photographs, with models as their users hold them: what transformers says of the same."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import vlm_jax
from tests.golden import peers_answers, peers_text, peers_vision
from tests.golden.drawn import weights
from tests.parity import with_big_vision
from vlm_jax import export, predict
from vlm_jax.core.errors import UserError
from vlm_jax.data import chat, images

CASES = peers_answers.read()
PHOTOGRAPHS = {name: str(peers_answers.photograph(name)) for name in peers_answers.PHOTOGRAPHS}
QUESTION = peers_answers.QUESTIONS[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders, and the second's weights as big_vision holds them."""
    place = tmp_path_factory.mktemp("place")
    for name, case in CASES.items():
        folder = peers_text.write(case["files"], place / name)
        save_file(weights(case["shapes"]), folder / "model.safetensors")
    export.main(["--model", str(place / "paligemma"), "--out", str(place / "paligemma.npz")])
    shutil.copy(place / "paligemma" / "processor_config.json", place)  # without, images are scaled as in big_vision
    return place


@pytest.mark.parametrize("name", ["llava", "paligemma", "paligemma.npz"])
def test_the_answer_to_a_photograph_is_the_references(place: Path, name: str, capsys) -> None:
    """Greedy, over 64 tokens. The `.npz` uses the tokenizer of the folder."""
    kind = name.removesuffix(".npz")
    wanted = CASES[kind]["of_photographs"]
    assert len(set(wanted)) == len(PHOTOGRAPHS)
    tokens = [] if name == kind else ["--tokenizer", str(place / kind)]
    capsys.readouterr()
    for photograph, answer in zip(PHOTOGRAPHS.values(), wanted, strict=True):
        asked = ["--image", photograph, "--prompt", QUESTION, "--max-new-tokens", str(peers_answers.NEW_TOKENS)]
        predict.main(["--model", str(place / name), *tokens, *asked])
        assert capsys.readouterr() == (f"{answer}\n", "")


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # big_vision's own
@with_big_vision
@pytest.mark.parametrize("photograph", PHOTOGRAPHS)
def test_big_vision_finds_each_of_our_tokens_the_likeliest(place: Path, photograph: str, monkeypatch) -> None:
    """From the same `.npz`: what its own greedy decoding would say behind the same photograph and prompt."""
    model = vlm_jax.load(place / "paligemma.npz", tokenizer=place / "paligemma")
    levels = images.fit([images.read_image(PHOTOGRAPHS[photograph])], model.spec.encoder)
    pixels = images.normalise(levels, model.spec.encoder)
    asked = np.array(
        [chat.prompt_ids(model.chat_format, model.tokenizer, QUESTION, model.image_token, model.visual_tokens)]
    )
    generated = vlm_jax.generate_tokens(model, pixels, asked, peers_answers.NEW_TOKENS)
    tokens = np.concatenate([asked[:, model.visual_tokens :], generated], axis=1)
    prompt = asked.shape[1] - model.visual_tokens
    monkeypatch.setitem(peers_vision.BV_IMAGE, "depth", peers_answers.VISION["num_hidden_layers"])
    monkeypatch.setitem(peers_vision.BV_TEXT, "vocab_size", peers_answers.TEXT["vocab_size"])
    monkeypatch.setitem(peers_vision.BV_TEXT, "mlp_dim", peers_answers.TEXT["intermediate_size"])
    suffix = np.arange(tokens.shape[1])[None] >= prompt
    logits = peers_vision.paligemma_of_big_vision("gemma", place / "paligemma.npz", pixels, tokens, suffix.astype(int))
    eos_positions = np.flatnonzero(np.isin(generated[0], model.eos_ids))
    count = eos_positions[0] + 1 if eos_positions.size else generated.shape[1]
    most_likely = logits[0, prompt - 1 : -1].argmax(axis=-1)
    np.testing.assert_array_equal(most_likely[:count], generated[0, :count])


@pytest.mark.parametrize("name", ["llava", "paligemma"])
def test_the_figure_is_a_picture_of_the_photograph(place: Path, name: str, tmp_path: Path, capsys) -> None:
    figure = tmp_path / "tokens.png"
    predict.main(["--model", str(place / name), "--image", PHOTOGRAPHS["china.jpg"], "--show-tokens", str(figure)])
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.png"]
    with Image.open(figure) as shown:
        assert min(shown.size) > 300
        assert np.asarray(shown.convert("L")).std() > 10
    assert capsys.readouterr() == ("", "")


def test_a_random_connector_prints_a_note(place: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that has no weights."""
    monkeypatch.setattr(vlm_jax, "generate", lambda *given: ["word"], raising=False)
    llava, image = str(place / "llava"), PHOTOGRAPHS["china.jpg"]
    for more, has_note in (
        (["--llm", llava], True),
        (["--compressor", "resampler", "--tokens", "2"], True),
        (["--compressor", "pool", "--tokens", "1"], False),
    ):
        predict.main(["--model", llava, *more, "--image", image, "--prompt", QUESTION])
        captured = capsys.readouterr()
        assert (captured.out, "not trained" in captured.err) == ("word\n", has_note)


def test_an_image_size_reaches_the_encoder(place: Path, capsys) -> None:
    """At 24 pixels there are 36 patches, at 3 none."""
    asked = ["--model", str(place / "llava"), "--image", PHOTOGRAPHS["china.jpg"], "--prompt", QUESTION]
    with pytest.raises(UserError, match=r"image_size: expected .* got 3"):
        predict.main([*asked, "--image-size", "3"])
    with pytest.raises(UserError, match="cannot give tokens=9"):
        predict.main([*asked, "--image-size", "24", "--compressor", "none", "--tokens", "9"])


def test_a_figure_that_cannot_be_written_is_refused_before_loading(tmp_path: Path) -> None:
    nowhere = ["--model", str(tmp_path / "none"), "--image", "none.png", "--show-tokens"]
    for name, message in {
        "stx": r"ends in \.png",
        str(tmp_path / "no" / "a.png"): "there is no folder",
    }.items():
        with pytest.raises(UserError, match=message):
            predict.main([*nowhere, name])


def test_several_images_in_one_prompt(place: Path, capsys) -> None:
    """In the order of the command line, as `generate` takes them."""
    files = list(PHOTOGRAPHS.values())[:2]
    (expected,) = vlm_jax.generate(vlm_jax.load(place / "llava"), [files], [QUESTION], 8)
    capsys.readouterr()
    flags = ["--image", *files, "--prompt", QUESTION, "--max-new-tokens", "8"]
    predict.main(["--model", str(place / "llava"), *flags])
    assert capsys.readouterr().out == f"{expected}\n"
