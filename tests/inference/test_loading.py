"""What `load` joins and lays out, against the path that training takes, and closed forms."""

import dataclasses
import inspect
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer

import vlm_jax
from tests import builders
from tests.golden import peers_answers, peers_text
from tests.golden.drawn import weights
from vlm_jax import predict
from vlm_jax.core.errors import UserError
from vlm_jax.core.structs import Inputs, Views
from vlm_jax.data import chat, chat_formats
from vlm_jax.distributed import partitioning
from vlm_jax.inference import api, token_maps
from vlm_jax.models.decoder import stack_layers, unstack_layers
from vlm_jax.models.vlm import Vlm

CASES = peers_answers.read()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("folders")
    out = {name: peers_text.write(CASES[name]["files"], place / name) for name in ("llava", "paligemma")}
    for name, folder in out.items():
        save_file(weights(CASES[name]["shapes"]), folder / "model.safetensors")
    return out


@pytest.fixture(scope="session")
def llava_tokenpacker(folders: dict[str, Path]) -> vlm_jax.Model:
    return vlm_jax.load(folders["llava"], llm=folders["llava"], compressor="tokenpacker", tokens=9, seed=3)


def trained_rows(model: vlm_jax.Model, text: np.ndarray, image: np.ndarray) -> Inputs:
    """The same question as training reads it: the image in front."""
    visual = np.full((len(text), model.visual_tokens), 0)
    tokens = np.concatenate([visual, text], axis=1).astype(np.int32)
    at = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(text), 1))
    order = np.zeros_like(at) if model.spec.mask == "prefix" else at
    which = np.where(at < model.visual_tokens, at, -1)
    return Inputs(tokens, np.ones_like(at), at, order, which, Views(image[:, None], question=text[:, None]))


def test_forward_is_what_training_runs(llava_tokenpacker: vlm_jax.Model) -> None:
    """Logits of image and text through `vlm_jax.forward`, and through the training forward on stacked parameters."""
    rng = np.random.default_rng(0)
    text = rng.integers(5, 300, (2, 6)).astype(np.int32)
    image = rng.standard_normal((2, 12, 12, 3)).astype(np.float32)
    assert llava_tokenpacker.spec.encoder.taps == (1,)
    marks = np.full((2, llava_tokenpacker.visual_tokens), llava_tokenpacker.image_token)
    found = vlm_jax.forward(llava_tokenpacker, image, np.concatenate([marks, text], axis=1))
    params = {**llava_tokenpacker.params, "decoder": stack_layers(llava_tokenpacker.params["decoder"])}
    model = Vlm(llava_tokenpacker.spec, builders.COMPUTE)
    read = jax.jit(lambda params, inputs: model.logits(params, model.forward(params, inputs)[0]))
    np.testing.assert_allclose(found, read(params, trained_rows(llava_tokenpacker, text, image)), atol=2e-5)


def test_a_compressor_may_read_the_question() -> None:
    """QueCC's vector is that of the text alone, in training and in `forward`."""
    spec = builders.model(compressor="quecc", tokens=4, mask="prefix")
    model, plan = Vlm(spec, builders.COMPUTE), partitioning.make_plan(builders.COMPUTE, jax.devices()[:1])
    params = builders.params(model)
    unrolled = {**params, "decoder": unstack_layers(params["decoder"], spec.decoder.depth)}
    loaded = vlm_jax.Model(spec, builders.compute(scan_layers=False), unrolled, plan, image_token=32)
    rng = np.random.default_rng(1)
    text, image = rng.integers(2, 32, (2, 5)).astype(np.int32), rng.standard_normal((2, 16, 16, 3)).astype(np.float32)
    found = vlm_jax.forward(loaded, image, np.concatenate([np.full((2, 4), 32), text], axis=1))
    read = jax.jit(lambda params, inputs: model.logits(params, model.forward(params, inputs)[0]))
    np.testing.assert_allclose(found, read(params, trained_rows(loaded, text, image)), atol=2e-5)


def test_padding_without_an_embedding_loads_and_is_refused_in_a_prompt(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Llama 2's `<pad>`, one beyond the table: neither a token of text nor an image's place."""
    folder = shutil.copytree(folders["llava"], tmp_path / "llm")
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    size = backend.get_vocab_size()
    backend.add_special_tokens([f"<extra{i}>" for i in range(384 - size)] + ["[PAD]"])
    backend.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "[PAD]"}))
    config = json.loads((folder / "config.json").read_text())
    del config["image_token_index"]
    (folder / "config.json").write_text(json.dumps(config))
    model = vlm_jax.load(folders["llava"], llm=folder, tokenizer=folder)
    assert model.pad == model.spec.decoder.vocab == 384
    assert model.image_token != model.pad
    [answer] = vlm_jax.generate(model, None, ["What is this?"], 4)
    assert vlm_jax.generate(model, None, ["What is this?", "What"], 4)[0] == answer
    with pytest.raises(UserError, match=r"row 1: expected ids below the vocabulary of 384, got 384 .*without an emb"):
        vlm_jax.generate(model, None, ["What", "What [PAD] is"], 4)


def test_two_images_in_a_prompt(folders: dict[str, Path]) -> None:
    """As messages, as a text that names them, and by ids; each image is read where its place is."""
    model = vlm_jax.load(folders["llava"])
    one, two = peers_answers.pictures()[:2]
    parts = [{"type": "image"}, {"type": "text", "text": "What"}, {"type": "image"}]
    prompts = [[{"role": "user", "content": parts}], "USER: <image> What <image> ASSISTANT:", "What"]
    many = [[one, two], [one, two], None]
    answers = vlm_jax.generate(model, many, prompts, 8)
    alone = [vlm_jax.generate(model, [some], [prompt], 8)[0] for some, prompt in zip(many, prompts, strict=True)]
    assert answers == alone
    tokens = np.array([[5, *[model.image_token] * 9, 6, *[model.image_token] * 9, 7]])
    both, swapped = (vlm_jax.forward(model, np.stack(pair)[None], tokens) for pair in ((one, two), (two, one)))
    assert np.abs(both - swapped)[0, 1:].max() > 1e-3
    np.testing.assert_array_equal(both[0, 0], swapped[0, 0])
    first = vlm_jax.forward(model, one[None], tokens[:, :11])
    np.testing.assert_allclose(both[:, :11], first, atol=1e-5)
    with pytest.raises(UserError, match=r"expected 1 image placeholders, .* got 2"):
        vlm_jax.generate(model, [one], prompts[:1], 8)
    with pytest.raises(UserError, match=r"expected 1 image placeholders, .* got 2"):
        vlm_jax.generate(model, [one], prompts[1:2], 8)
    with pytest.raises(UserError, match=r"expected 9 image placeholders .* got 18"):
        vlm_jax.forward(model, one[None], tokens)


def test_what_is_asked_is_the_bare_question() -> None:
    """Without the template, whatever form the prompt has (QueCC's own reading of LLaVA's prompts)."""
    layout = chat_formats.ChatFormat("template", "", "<image>")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "And that?"},
    ]
    for prompt in ("What is this?", "Be brief. USER: <image>\nWhat is this? ASSISTANT:", messages):
        assert chat.bare_question(layout, prompt) == "What is this?"


def test_a_plan_of_several_devices_changes_nothing(folders: dict[str, Path]) -> None:
    """Three rows on a mesh of 2 x 2 x 2: rows are filled up, weights are split, answers are the same."""
    compute = dataclasses.replace(builders.COMPUTE, strategy="fsdp_tensor", mesh=(2, 2, 2))
    model = vlm_jax.load(folders["llava"], plan=partitioning.make_plan(compute))
    kernel = model.params["decoder"]["blocks_0"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape
    pictures = list(peers_answers.pictures())
    assert vlm_jax.generate(model, pictures, peers_answers.QUESTIONS, 16) == vlm_jax.generate(
        vlm_jax.load(folders["llava"]), pictures, peers_answers.QUESTIONS, 16
    )


def test_shares_of_pooled_patches_are_equal(folders: dict[str, Path]) -> None:
    """A mean over a cell moves with each of its patches alike, and with no other: 9 patches in one token, or in 9."""
    image = peers_answers.pictures()[:1].astype(np.float32) / 255
    whole = vlm_jax.load(folders["llava"], compressor="pool", tokens=1)
    np.testing.assert_allclose(
        token_maps.patch_shares(whole, image, np.arange(1)), np.full((1, 3, 3), 1 / 9), rtol=1e-4
    )
    every = vlm_jax.load(folders["llava"])
    np.testing.assert_allclose(token_maps.patch_shares(every, image, np.arange(9)).reshape(9, 9), np.eye(9), atol=1e-6)


def test_the_figure_is_a_picture(llava_tokenpacker: vlm_jax.Model, tmp_path: Path) -> None:
    from PIL import Image

    image = peers_answers.pictures()[:1]
    which = token_maps.shown(llava_tokenpacker)
    token_maps.draw(
        llava_tokenpacker,
        image,
        token_maps.patch_shares(llava_tokenpacker, image, which),
        which,
        tmp_path / "tokens.png",
    )
    with Image.open(tmp_path / "tokens.png") as figure:
        assert min(figure.size) > 300
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.png"]


def test_on_read_gets_running_and_total_bytes(folders: dict[str, Path]) -> None:
    calls = []
    vlm_jax.load(folders["paligemma"], on_read=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] == calls[-1][1] > 50_000


def test_bad_combinations_are_one_line_errors(folders: dict[str, Path], tmp_path: Path) -> None:
    llava = folders["llava"]
    small = shutil.copytree(llava, tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (small / name).unlink()
    large = shutil.copytree(llava, tmp_path / "large")
    vocab = json.loads((large / "tokenizer.json").read_text())
    vocab["model"]["vocab"]["far"] = 400
    (large / "tokenizer.json").write_text(json.dumps(vocab))
    far = shutil.copytree(llava, tmp_path / "far")
    (far / "generation_config.json").write_text('{"eos_token_id": 5000}')
    for message, path, settings in (
        ("no such file", tmp_path / "nothing", {}),
        ("did you mean 'pool'", llava, dict(compressor="pol", tokens=1)),
        ("cannot give tokens=5", llava, dict(compressor="tokenpacker", tokens=5)),
        ("name the compressor", llava, dict(tokens=4)),
        ("set tokens=V", llava, dict(compressor="pool")),
        ("expected tokenizer ids below", large, {}),
        ("eos_token_id below the vocabulary", far, {}),
        ("unknown dtype", llava, dict(dtype=np.float16)),
        ("seed: expected", llava, dict(seed=2**70)),
    ):
        with pytest.raises(UserError, match=message):
            vlm_jax.load(path, **settings)
    assert vlm_jax.load(small, dtype=np.float32).tokenizer is None


def test_mistyped_arguments_are_one_line_errors(folders: dict[str, Path]) -> None:
    """Without runtime type checks, as users call it."""
    load, llava = inspect.unwrap(vlm_jax.load), folders["llava"]
    for message, path, settings in (
        ("path: expected the name of .* got None", None, {}),
        ("path: expected the name of .* got 3", 3, {}),
        ("llm: expected the name of .* got 3", llava, dict(llm=3)),
        ("tokenizer: expected the name of .* got 3", llava, dict(tokenizer=3)),
        ("plan: expected a Plan", llava, dict(plan="fsdp")),
        ("image_size: expected an integer, got 24.0", llava, dict(image_size=24.0)),
        ("image_size: expected an integer, got 24", llava, dict(image_size="24")),
        ("tokens: expected an integer, got True", llava, dict(compressor="pool", tokens=True)),
        ("tokens: expected an integer, got nan", llava, dict(compressor="pool", tokens=float("nan"))),
        ("unknown compressor 3", llava, dict(compressor=3, tokens=1)),
        ("seed: expected an integer, got x", llava, dict(seed="x")),
    ):
        with pytest.raises(UserError, match=message):
            load(path, **settings)
    assert load(llava, compressor="pool", tokens=np.int64(1)).visual_tokens == 1


def test_shares_follow_the_question(folders: dict[str, Path]) -> None:
    """A compressor that reads the question needs one, and two questions give different shares."""
    model = vlm_jax.load(folders["llava"], llm=folders["llava"], compressor="quecc", tokens=1)
    image = peers_answers.pictures()[:1].astype(np.float32) / 255
    with pytest.raises(UserError, match="--prompt"):
        token_maps.patch_shares(model, image, np.arange(1))
    questions = [np.array([api.question_ids(model, question)]) for question in peers_answers.QUESTIONS[:2]]
    one, other = (token_maps.patch_shares(model, image, np.arange(1), question) for question in questions)
    assert np.abs(one - other).max() > 1e-6


def test_the_name_of_a_figure_is_checked_first(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"ends in \.png"):
        predict.main(["--model", str(folders["llava"]), "--image", "none.png", "--show-tokens", "stx"])
