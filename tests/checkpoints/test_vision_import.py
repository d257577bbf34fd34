"""Image towers and vision-language models in the files that users hold, against what their own libraries computed."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import vlm_jax
from tests import builders
from tests.golden import drawn
from tests.golden import peers_vision as peers
from vlm_jax.checkpoints.huggingface import exporting, hf_encoder
from vlm_jax.checkpoints.inspection import inspect, load_parts, model_spec
from vlm_jax.checkpoints.tensor_files import open_weights
from vlm_jax.checkpoints.tensor_tables import load_params
from vlm_jax.core import tree
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import ModelSpec
from vlm_jax.core.structs import Inputs, Views
from vlm_jax.models import vision
from vlm_jax.models.vision import Encoder
from vlm_jax.models.vlm import Vlm

HF = np.load(Path(__file__).parents[1] / "golden/peers_vision_hf.npz")
BV = np.load(Path(__file__).parents[1] / "golden/peers_vision_bv.npz")
TOWERS = ("siglip_vision", "siglip", "clip_vision", "clip_projection", "clip")


def close(found: Any, wanted: np.ndarray, share: float = 1e-4) -> None:
    """No difference above that share of the wanted values' standard deviation."""
    assert found.shape == wanted.shape
    assert np.abs(np.asarray(found) - wanted).max() <= share * wanted.std()


def write(folder: Path, name: str, **changes: Any) -> Path:
    """The folder that the peer read, drawn again; `changes` go into config.json."""
    files = json.loads(str(HF[f"{name}/files"]))
    folder.mkdir(exist_ok=True)
    save_file(drawn.weights(files["shapes"]), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**files["config"], **changes}))
    return folder


def tower(folder: Path, **view: Any) -> tuple[Encoder, Any]:
    weights, config = open_weights(folder), json.loads((folder / "config.json").read_text())
    spec = hf_encoder.encoder_spec(hf_encoder.vision_config(config, "config.json"), "config.json")
    spec = dataclasses.replace(spec, **view)
    prefix = hf_encoder.prefix_of(weights)
    encoder = Encoder(spec, builders.COMPUTE)
    boxed = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, spec.image_size, spec.image_size, 3)))
    ignore = (*hf_encoder.IGNORED, *hf_encoder.unused(spec, prefix))
    return encoder, load_params(
        weights, hf_encoder.encoder_table(spec, prefix), boxed["params"], None, "float32", ignore
    )


def encode(encoder: Encoder, params: Any, side: int) -> Any:
    def run(p: Any, image: Any) -> Any:
        visual = encoder.apply({"params": p}, image, method="encode")
        pooled = encoder.apply({"params": p}, visual, method="pool") if encoder.spec.pooling_head else None
        return visual, pooled

    return jax.jit(run)(params, peers.pixels(side))


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_gives_its_references_tokens(tmp_path, name: str) -> None:
    """Final tokens, every layer, and SigLIP's pooled vector; a text tower or a projection beside it is left alone."""
    encoder, params = tower(write(tmp_path, name), taps=(3, 1, 2))
    visual, pooled = encode(encoder, params, 18)
    first = int(encoder.spec.class_token)
    close(visual.tokens, HF[f"{name}/tokens"][:, first:])
    for slot, layer in enumerate(encoder.spec.taps):
        close(visual.taps[:, slot], HF[f"{name}/layers"][:, layer - 1, first:])
    if pooled is not None:
        close(pooled, HF[f"{name}/pooled"])


@pytest.mark.parametrize("taps", [(3, 1), (2,)])
def test_tokens_of_an_inner_layer(tmp_path, taps: tuple[int, ...]) -> None:
    """They are that block's output, whichever layers are tapped beside; no block runs behind the last of them."""
    encoder, params = tower(write(tmp_path, "clip_vision"), taps=taps, feature_layer=2)
    assert len(params["blocks"]["mlp"]["up"]["bias"]) == max(taps)
    visual, _ = encode(encoder, params, 18)
    close(visual.tokens, HF["clip_vision/layers"][:, 1, 1:])
    for slot, layer in enumerate(taps):
        close(visual.taps[:, slot], HF["clip_vision/layers"][:, layer - 1, 1:])


@pytest.mark.parametrize("name", ["siglip_vision", "clip_vision"])
def test_another_resolution_is_the_references(tmp_path, name: str) -> None:
    encoder, params = tower(write(tmp_path, name))
    params, spec = vision.params_at_size(params, encoder.spec, 24, "bicubic"), vision.at_size(encoder.spec, 24)
    visual, _ = encode(Encoder(spec, builders.COMPUTE), params, 24)
    close(visual.tokens, HF[f"{name}/wide"][:, int(spec.class_token) :])


VLMS = ("llava", "llava_siglip", "paligemma", "paligemma2", "paligemma2_narrow")


def whole(path: Path) -> tuple[Vlm, Any]:
    found = inspect(path)
    return Vlm(model_spec(found), builders.COMPUTE), load_parts(found)


def prompt(model: Vlm, side: int = 18) -> Inputs:
    tokens, answer = peers.prompts(image_first=model.spec.mask == "prefix")
    here = tokens == peers.IMAGE_TOKEN
    position = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    order = position if model.spec.mask == "causal" else np.where(answer, position, 0)
    visual = np.where(here, np.cumsum(here, axis=1) - 1, -1)
    arrays = (part.astype(np.int32) for part in (tokens, np.ones_like(tokens), position, order, visual))
    return Inputs(*arrays, Views(peers.pixels(side)[:, None]))


def logits_and_features(model: Vlm, params: Any, inputs: Inputs) -> tuple[Any, Any]:
    def run(params: Any, inputs: Inputs) -> tuple[Any, Any]:
        logits = model.logits(params, model.forward(params, inputs)[0])
        return logits, model.embed_views(params, inputs.views).tokens

    return jax.jit(run)(params, inputs)


@pytest.mark.parametrize("name", VLMS)
def test_a_whole_model_gives_its_references_logits(tmp_path, name: str) -> None:
    """Image features behind the projector, and the logits of every token of a prompt with its answer."""
    model, params = whole(write(tmp_path, name))
    logits, features = logits_and_features(model, params, prompt(model))
    close(features, HF[f"{name}/features"].reshape(features.shape))
    close(logits, HF[f"{name}/logits"])


def write_npz(folder: Path, name: str, rename: Any = lambda tensor: tensor) -> Path:
    shapes = json.loads(str(BV[f"{name}/files"]))["shapes"]
    np.savez(folder / "model.npz", **{rename(key): leaf for key, leaf in peers.bv_weights(shapes).items()})
    return folder / "model.npz"


@pytest.mark.parametrize("name", ["vit", "vit_scan", "two_towers"])
def test_a_big_vision_tower_gives_its_references_tokens(tmp_path, name: str) -> None:
    """Blocks apart, blocks stacked, and the image side of two towers."""
    found = inspect(write_npz(tmp_path, name))
    encoder = Encoder(found.encoder, builders.COMPUTE)
    visual, pooled = encode(encoder, load_parts(found)["encoder"], 16)
    close(visual.tokens, BV[f"{name}/tokens"])
    close(pooled, BV[f"{name}/pooled"])


@pytest.mark.parametrize("name", ["paligemma_gemma", "paligemma_gemma_full_heads", "paligemma_gemma2"])
def test_a_big_vision_paligemma_gives_its_references_logits(tmp_path, name: str) -> None:
    model, params = whole(write_npz(tmp_path, name))
    assert model.spec.mask == "prefix"
    logits, features = logits_and_features(model, params, prompt(model, 16))
    close(features, BV[f"{name}/features"])
    close(logits[:, peers.PATCHES :], BV[f"{name}/logits"])


@pytest.mark.parametrize("side", [3, 6, 7])
def test_positions_resize_as_big_vision_resizes_them(side: int) -> None:
    close(vision.resize_positions(BV["positions"], (4, 4), (side, side), "bilinear"), BV[f"positions/{side}"])


LAYOUTS = {
    "transformers 4": [(r"^vision_tower\.", "vision_tower.vision_model.")],
    "transformers 5": [
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    ],
}


@pytest.mark.parametrize("name", ["llava", "paligemma2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_names_is_the_same_model(tmp_path, name: str, layout: str) -> None:
    write(tmp_path / "a", name)
    write(tmp_path / "b", name)
    tensors = drawn.weights(json.loads(str(HF[f"{name}/files"]))["shapes"])
    for pattern, new in LAYOUTS[layout]:
        tensors = {re.sub(pattern, new, key): leaf for key, leaf in tensors.items()}
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    one, other = (load_parts(inspect(tmp_path / folder)) for folder in "ab")
    assert tree.sha256(one) == tree.sha256(other)


@pytest.mark.parametrize("name", [*VLMS, "siglip_vision"])
def test_a_folder_written_and_read_again_is_the_same_model(tmp_path, name: str) -> None:
    """Bit for bit. The tower that was cut is as deep as it was held."""
    found = inspect(write(tmp_path / "a", name))
    params = load_parts(found)
    whole_spec = found.decoder is not None
    spec = model_spec(found) if whole_spec else ModelSpec(found.encoder, None, None, None, "causal")
    exporting.save_folder(tmp_path / "b", spec, params, found.image_token)
    again = inspect(tmp_path / "b")
    assert tree.sha256(load_parts(again)) == tree.sha256(params)
    assert again.encoder.feature_layer == found.encoder.feature_layer


def test_a_paligemma_checkpoint_of_big_vision_written_and_read_again(tmp_path) -> None:
    """The same names and bytes that big_vision wrote, and what is no PaliGemma is refused."""
    first = write_npz(tmp_path, "paligemma_gemma2")
    found = inspect(first)
    exporting.save_npz(tmp_path / "again.npz", model_spec(found), load_parts(found))
    with np.load(first) as one, np.load(tmp_path / "again.npz") as other:
        assert sorted(one.files) == sorted(other.files)
        for name in one.files:
            np.testing.assert_array_equal(one[name], other[name])
    llava = inspect(write(tmp_path / "llava", "llava"))
    with pytest.raises(UserError, match="projector mlp, mask causal"):
        exporting.save_npz(tmp_path / "llava.npz", model_spec(llava), {})


@pytest.mark.parametrize("name", ["llava", "paligemma2_narrow"])
def test_a_loaded_model_says_what_its_reference_says(tmp_path, name: str) -> None:
    """Through the public door: logits of the reference's own inputs, and its greedy text."""
    model = vlm_jax.load(write(tmp_path, name), dtype="float32")._replace(eos_ids=())
    tokens, answer = peers.prompts(image_first=name.startswith("pali"))
    close(vlm_jax.forward(model, peers.pixels(18), tokens, answer=answer), HF[f"{name}/logits"])
    asked = tokens[:, :-4].astype(np.int32)
    found = vlm_jax.generate_tokens(model, peers.pixels(18), asked, max_new_tokens=6)
    np.testing.assert_array_equal(found, HF[f"{name}/generated"])


def test_two_models_joined_at_another_resolution(tmp_path) -> None:
    """SigLIP of one folder with the language model of another: the reference's tokens at 24 pixels, 36 of them."""
    siglip, llm = write(tmp_path / "siglip", "siglip_vision"), write(tmp_path / "llava", "llava")
    model = vlm_jax.load(siglip, llm=llm, dtype="float32", image_size=24)
    assert (model.visual_tokens, model.spec.encoder.image_size) == (36, 24)
    visual = jax.jit(Vlm(model.spec, model.compute).encode)(model.params, jnp.asarray(peers.pixels(24)))
    close(visual.tokens, HF["siglip_vision/wide"])
    with pytest.raises(UserError, match="image_size: expected at least"):
        vlm_jax.load(siglip, llm=llm, image_size=3)
