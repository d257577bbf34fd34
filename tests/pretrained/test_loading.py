"""What `load` joins and lays out, against the path that training takes, and closed forms."""

import dataclasses
import inspect
import json
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import vlm_jax
from tests import builders
from tests.golden import peers_answers, peers_text
from tests.golden.drawn import weights
from vlm_jax import partitioning, predict
from vlm_jax.core.errors import UserError
from vlm_jax.core.structs import Batch
from vlm_jax.models import layerwise
from vlm_jax.models.vlm import Vlm
from vlm_jax.pretrained import answering, sight

CASES = peers_answers.read()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("folders")
    out = {name: peers_text.write(CASES[name]["files"], place / name) for name in ("llava", "paligemma")}
    for name, folder in out.items():
        save_file(weights(CASES[name]["shapes"]), folder / "model.safetensors")
    return out


@pytest.fixture(scope="session")
def joined(folders: dict[str, Path]) -> vlm_jax.Model:
    return vlm_jax.load(folders["llava"], llm=folders["llava"], compressor="tokenpacker", tokens=9, seed=3)


def batch(model: vlm_jax.Model, text: np.ndarray, image: np.ndarray) -> Batch:
    """The same question as training would read it: the image in front."""
    at = np.tile(np.arange(text.shape[1], dtype=np.int32), (len(text), 1))
    ones = np.ones_like(text)
    return Batch(text, text, ones.astype(np.float32), ones, at, ones > 0, ones[:, 0], image)


def test_joined_models_are_what_training_would_run(joined: vlm_jax.Model) -> None:
    """Logits of image and text through `forward`, and through the training path on the stacked parameters."""
    rng = np.random.default_rng(0)
    text = rng.integers(5, 300, (2, 6)).astype(np.int32)
    image = rng.standard_normal((2, 12, 12, 3)).astype(np.float32)
    assert joined.spec.encoder.taps == (1,)
    marks = np.full((2, joined.visual_tokens), joined.image_token)
    found = vlm_jax.forward(joined, image, np.concatenate([marks, text], axis=1))
    params = {**joined.params, "decoder": layerwise.stack(joined.params["decoder"])}
    model = Vlm(joined.spec, joined.compute)
    wanted = jax.jit(model.forward)(params, batch(joined, text, image))
    np.testing.assert_allclose(found[:, joined.visual_tokens :], wanted, atol=2e-5)


def test_a_compressor_may_read_the_question() -> None:
    """QueCC's vector is that of the text alone, in both paths; the image stands first."""
    spec = builders.model(compressor="quecc", tokens=4, mask="prefix")
    model, plan = Vlm(spec, builders.COMPUTE), partitioning.make_plan(builders.COMPUTE, jax.devices()[:1])
    params = builders.params(model)
    split = {**params, "decoder": layerwise.split(params["decoder"], spec.decoder.depth)}
    loaded = vlm_jax.Model(spec, builders.COMPUTE, split, plan, image_token=32)
    rng = np.random.default_rng(1)
    text, image = rng.integers(2, 32, (2, 5)).astype(np.int32), rng.standard_normal((2, 16, 16, 3)).astype(np.float32)
    found = vlm_jax.forward(loaded, image, np.concatenate([np.full((2, 4), 32), text], axis=1))
    wanted = jax.jit(model.forward)(params, batch(loaded, text, image))
    np.testing.assert_allclose(found[:, 4:], wanted, atol=2e-5)


def test_a_plan_of_several_devices_changes_nothing(folders: dict[str, Path]) -> None:
    """Three rows on a mesh of 2 x 2 x 2: rows are filled up, weights are split, answers are the same."""
    compute = dataclasses.replace(builders.COMPUTE, strategy="fsdp_tensor", mesh=(2, 2, 2))
    model = vlm_jax.load(folders["llava"], plan=partitioning.make_plan(compute))
    kernel = model.params["decoder"]["layers"][0]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape
    pictures = list(peers_answers.pictures())
    assert vlm_jax.generate(model, pictures, peers_answers.QUESTIONS, 16) == vlm_jax.generate(
        vlm_jax.load(folders["llava"]), pictures, peers_answers.QUESTIONS, 16
    )


def test_splitting_and_stacking_layers_are_inverse() -> None:
    params = builders.params(Vlm(builders.model(), builders.COMPUTE))["decoder"]
    back = layerwise.stack(layerwise.split(params, builders.DECODER.depth))
    assert jax.tree.structure(back) == jax.tree.structure(nn.meta.unbox(params))
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_shares_of_pooled_patches_are_equal(folders: dict[str, Path]) -> None:
    """A mean over a cell moves with each of its patches alike, and with no other: 9 patches in one token, or in 9."""
    image = peers_answers.pictures()[:1].astype(np.float32) / 255
    whole = vlm_jax.load(folders["llava"], compressor="pool", tokens=1)
    np.testing.assert_allclose(sight.patch_shares(whole, image, np.arange(1)), np.full((1, 3, 3), 1 / 9), rtol=1e-4)
    every = vlm_jax.load(folders["llava"])
    np.testing.assert_allclose(sight.patch_shares(every, image, np.arange(9)).reshape(9, 9), np.eye(9), atol=1e-6)


def test_the_figure_is_a_picture(joined: vlm_jax.Model, tmp_path: Path) -> None:
    from PIL import Image

    image = peers_answers.pictures()[:1]
    which = sight.shown(joined)
    sight.draw(joined, image, sight.patch_shares(joined, image, which), which, tmp_path / "tokens.png")
    with Image.open(tmp_path / "tokens.png") as figure:
        assert min(figure.size) > 300
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.png"]


def test_reading_is_told_in_bytes(folders: dict[str, Path]) -> None:
    heard = []
    vlm_jax.load(folders["paligemma"], on_read=lambda done, total: heard.append((done, total)))
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert heard[-1][0] == heard[-1][1] > 50_000


def test_bad_combinations_are_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    llava = folders["llava"]
    small = shutil.copytree(llava, tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (small / name).unlink()
    words = shutil.copytree(llava, tmp_path / "words")
    said = json.loads((words / "tokenizer.json").read_text())
    said["model"]["vocab"]["far"] = 400
    (words / "tokenizer.json").write_text(json.dumps(said))
    far = shutil.copytree(llava, tmp_path / "far")
    (far / "generation_config.json").write_text('{"eos_token_id": 5000}')
    for told, path, how in (
        ("no such file", tmp_path / "nothing", {}),
        ("did you mean 'pool'", llava, dict(compressor="pol", tokens=1)),
        ("cannot give tokens=5", llava, dict(compressor="tokenpacker", tokens=5)),
        ("name the compressor", llava, dict(tokens=4)),
        ("set tokens=V", llava, dict(compressor="pool")),
        ("do not belong together", words, {}),
        ("outside the vocabulary", far, {}),
        ("unknown dtype", llava, dict(dtype=np.float16)),
        ("seed=", llava, dict(seed=2**70)),
    ):
        with pytest.raises(UserError, match=told):
            vlm_jax.load(path, **how)
    assert vlm_jax.load(small, dtype=np.float32).tokenizer is None


def test_what_is_no_path_no_plan_and_no_number_is_one_line(folders: dict[str, Path]) -> None:
    """Without the assertions that annotations are here: as users call it."""
    load, llava = inspect.unwrap(vlm_jax.load), folders["llava"]
    for told, path, how in (
        ("path=None: the name of", None, {}),
        ("path=3: the name of", 3, {}),
        ("llm=3: the name of", llava, dict(llm=3)),
        ("tokenizer=3: the name of", llava, dict(tokenizer=3)),
        ("plan=fsdp: a Plan", llava, dict(plan="fsdp")),
        ("image_size=24.0: a whole number", llava, dict(image_size=24.0)),
        ("image_size=24: a whole number", llava, dict(image_size="24")),
        ("tokens=True: a whole number", llava, dict(compressor="pool", tokens=True)),
        ("tokens=nan: a whole number", llava, dict(compressor="pool", tokens=float("nan"))),
        ("unknown compressor 3", llava, dict(compressor=3, tokens=1)),
        ("seed=x", llava, dict(seed="x")),
    ):
        with pytest.raises(UserError, match=told):
            load(path, **how)
    assert load(llava, compressor="pool", tokens=np.int64(1)).visual_tokens == 1


def test_shares_follow_the_question(folders: dict[str, Path]) -> None:
    """A compressor that reads the question wants one, and two questions give two figures."""
    model = vlm_jax.load(folders["llava"], llm=folders["llava"], compressor="quecc", tokens=1)
    image = peers_answers.pictures()[:1].astype(np.float32) / 255
    with pytest.raises(UserError, match="--prompt"):
        sight.patch_shares(model, image, np.arange(1))
    vectors = [answering.question_vector(model, said) for said in peers_answers.QUESTIONS[:2]]
    one, other = (sight.patch_shares(model, image, np.arange(1), vector) for vector in vectors)
    assert np.abs(one - other).max() > 1e-6


def test_the_name_of_a_figure_is_checked_first(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"ends in \.png"):
        predict.main(["--model", str(folders["llava"]), "--image", "none.png", "--show-tokens", "stx"])
