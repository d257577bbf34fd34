"""One description of a model: what a config resolves to, what `load` joins and what a plan prices are the same."""

import dataclasses
from pathlib import Path

import builders
import jax.numpy as jnp
import pytest
from safetensors.numpy import save_file

import vlm_jax
from tests.checkpoints import test_vision_import as vision
from tests.golden import drawn, peers_answers, peers_text
from tests.golden import peers_vision as peers
from vlm_jax.checkpoints.info import CheckpointInfo
from vlm_jax.compress import catalog
from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import model_group, resolve
from vlm_jax.core.errors import UserError
from vlm_jax.core.specs import CompressorSpec
from vlm_jax.inference import joining
from vlm_jax.models.vision import Encoder
from vlm_jax.scaling import candidates, lawfile
from vlm_jax.sizing import zoo

ROOT = Path(__file__).parents[1]
LLM = "qwen1.5-1.8b"
ENCODERS = ("clip-l14-336", "siglip-so400m14-384", "siglip-b16-224", "siglip2-g16-384")
NAMES = [name for name in catalog.ROWS if name != "blind"]


def configured(config: str, **fields):
    arg = ",".join(f"{name}={value}" for name, value in fields.items())
    return resolve(load_config(f"{ROOT / 'configs' / config}.py:{arg}")).model


def loaded(encoder, compressor, tokens):
    """As `load` joins an image tower with a language model: of CLIP, whose tokens are those of the last block."""
    if encoder.class_token:
        encoder = dataclasses.replace(encoder, feature_layer=encoder.depth)
    parts = CheckpointInfo("a tower", encoder, None, None, "causal", None, {}, None, {})
    llm = CheckpointInfo("a language model", None, None, zoo.decoder(LLM), "causal", None, {}, None, {})
    return joining.joined_spec(parts, llm, compressor, tokens)


def planned(encoder, compressor, tokens):
    law = lawfile.read(ROOT / "experiments" / "published_law" / "law.json")
    (one,) = candidates.candidates(law.family("ocr"), "nominal", (encoder,), (LLM,), (compressor,), (tokens,))
    return one.model


@pytest.mark.parametrize("compressor", NAMES)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_configs_load_and_the_planner_describe_one_model(encoder: str, compressor: str) -> None:
    spec = zoo.encoder(encoder)
    possible = catalog.row(compressor).tokens_out(spec.grid)
    for tokens in sorted({possible[0], possible[len(possible) // 2], possible[-1]}):
        config = configured("llava", encoder=encoder, compressor=compressor, tokens=tokens, llm=LLM)
        assert config == loaded(spec, compressor, tokens) == planned(encoder, compressor, tokens)
        assert config.compressor.tokens == tokens


@pytest.mark.parametrize("compressor", ["quecc", "tokenpacker"])
def test_the_published_configuration_is_the_default(compressor: str) -> None:
    """Of the official code: keys and values of blocks 12, 16, 22 and 23, tokens of block 23, 1024 channels, 8 heads."""
    model = configured("llava", encoder="clip-l14-336", compressor=compressor, tokens=16, llm="vicuna-7b")
    assert (model.encoder.taps, model.encoder.feature_layer, model.encoder.blocks) == ((12, 16, 22, 23), 23, 23)
    assert model.compressor == CompressorSpec(
        compressor, 16, (24, 24), 1024, taps=4, text_width=4096, width=1024, heads=8, depth=1, mlp_width=0
    )
    assert (model.projector, model.mask) == ("mlp", "causal")


@pytest.mark.parametrize("compressor", NAMES)
def test_the_study_keeps_its_sizes(compressor: str) -> None:
    encoder, decoder = zoo.encoder("glyph-64"), zoo.decoder("d48")
    tokens = catalog.row(compressor).tokens_out(encoder.grid)[0]
    model = configured("vlm", compressor=compressor, tokens=tokens, llm="d48")
    spec = model.compressor
    if not catalog.stages(model):
        assert (spec.width, spec.heads, spec.depth, spec.mlp_width) == (64, 16, 1, 128)
    assert model.encoder.taps == ((1, 2, 3, 4) if compressor in ("quecc", "tokenpacker") else ())
    assert model == catalog.model_spec(encoder, compressor, tokens, decoder, projector="linear")
    assert set(model_group(model)) == set(load_config(str(ROOT / "configs" / "vlm.py")).model)


def test_a_checkpoint_that_reads_an_inner_block_keeps_it() -> None:
    encoder = dataclasses.replace(zoo.encoder("clip-l14-336"), feature_layer=18)
    model = catalog.model_spec(encoder, "quecc", 4, zoo.decoder(LLM))
    assert (model.encoder.feature_layer, model.encoder.taps) == (18, (12, 16, 18))
    assert model.compressor.taps == 3


def test_a_tower_of_clip_is_read_up_to_its_last_block_but_one(tmp_path: Path) -> None:
    """Its folder has the last block too, and the classes of transformers would give that one's output."""
    case = peers_answers.read()["llava"]
    llm = peers_text.write(case["files"], tmp_path / "llava")
    save_file(drawn.weights(case["shapes"]), llm / "model.safetensors")
    model = vlm_jax.load(vision.write(tmp_path / "clip", "clip_vision"), llm=llm, compressor="quecc", tokens=1)
    encoder = model.spec.encoder
    assert (encoder.depth, encoder.feature_layer, encoder.taps) == (3, 2, (1, 2))
    images = jnp.asarray(peers.pixels(encoder.image_size))
    visual = Encoder(encoder, builders.COMPUTE).apply({"params": model.params["encoder"]}, images, method="encode")
    vision.close(visual.tokens, vision.HF["clip_vision/layers"][:, 1, 1:])


def test_without_v_a_method_that_has_one_takes_it() -> None:
    encoder, decoder = zoo.encoder("siglip-b16-224"), zoo.decoder(LLM)
    assert catalog.model_spec(encoder, "none", None, decoder).compressor.tokens == 196
    with pytest.raises(UserError, match="'pool' gives several numbers of tokens: set tokens=V"):
        catalog.model_spec(encoder, "pool", None, decoder)


@pytest.mark.parametrize("encoder", zoo.ENCODERS)
@pytest.mark.parametrize("compressor", catalog.ROWS)
def test_every_default_can_be_built(encoder: str, compressor: str) -> None:
    """`catalog.check` holds, no block is read that does not run, and the counts on both sides agree."""
    spec = zoo.encoder(encoder)
    for tokens in {*catalog.row(compressor).tokens_out(spec.grid)[:2]}:
        model = catalog.model_spec(spec, compressor, tokens, zoo.decoder(LLM))
        assert len(model.encoder.taps) == model.compressor.taps
        assert all(1 <= tap <= model.encoder.blocks for tap in model.encoder.taps)
        assert model.encoder.blocks == max(model.encoder.feature_layer or spec.depth, model.encoder.attention_layer)
