"""The zoo against published parameter counts, and the formulas against the modules."""

import jax
import pytest
from builders import COMPUTE

from vlm_jax.core.errors import UserError
from vlm_jax.core.structs import AttentionMetadata
from vlm_jax.core.tree import count
from vlm_jax.models.decoder import Decoder
from vlm_jax.models.vision import Encoder
from vlm_jax.sizing import cost, zoo

# Scalars of the published checkpoints, in millions (vision towers, as open_clip's model profile lists them, less CLIP's
# projection of 1024 x 768) and in billions (safetensors totals, or reports where these count the text model alone).
ENCODERS = {
    "siglip-b16-224": 92.88, "siglip-b16-384": 93.18, "siglip-l16-256": 315.96, "siglip-l16-384": 316.28,
    "siglip-so400m14-224": 427.68, "siglip-so400m14-384": 428.23, "clip-l14-336": 304.29 - 0.786,
    "siglip2-b16-224": 92.93, "siglip2-b16-384": 93.18, "siglip2-l16-384": 316.28, "siglip2-so400m14-224": 427.89,
    "siglip2-so400m14-384": 428.23, "siglip2-so400m16-384": 428.39, "siglip2-g16-384": 1164.0,
    "clip-l14-224": 303.97 - 0.786,
}  # fmt: skip
DECODERS = {
    "qwen1.5-0.5b": 0.464, "qwen1.5-1.8b": 1.837, "qwen1.5-4b": 3.95, "qwen1.5-7b": 7.72, "qwen1.5-14b": 14.17,
    "qwen1.5-32b": 32.5, "qwen1.5-72b": 72.3, "qwen2.5-0.5b": 0.494, "qwen2.5-1.5b": 1.544, "qwen2.5-3b": 3.086,
    "qwen2.5-7b": 7.616, "qwen2.5-14b": 14.77, "qwen2.5-32b": 32.76, "qwen2.5-72b": 72.71, "qwen3-0.6b": 0.596,
    "qwen3-1.7b": 1.72, "qwen3-4b": 4.02, "qwen3-8b": 8.19, "qwen3-14b": 14.77, "qwen3-32b": 32.76, "llama2-7b": 6.738,
    "llama2-13b": 13.016, "llama3.2-1b": 1.236, "llama3.2-3b": 3.213, "llama3.1-8b": 8.030, "llama3.1-70b": 70.55,
    "gemma-2b": 2.506, "gemma-7b": 8.538, "gemma2-2b": 2.614, "gemma2-9b": 9.242, "gemma2-27b": 27.227,
    "gemma3-1b": 1.000, "gemma3-4b": 3.884, "gemma3-12b": 11.771, "gemma3-27b": 27.016, "smollm2-135m": 0.1345,
    "smollm2-360m": 0.3618, "smollm2-1.7b": 1.711,
}  # fmt: skip
# Reports that give the part without embeddings, in billions.
NON_EMBEDDING = {"qwen2.5-0.5b": 0.36, "qwen2.5-1.5b": 1.31, "qwen2.5-7b": 6.53, "qwen3-0.6b": 0.44, "gemma3-4b": 3.209}


@pytest.mark.parametrize("name", [name for name in zoo.ENCODERS if name != "glyph-64"])
def test_encoder_has_the_published_count(name):
    assert cost.encoder_params(zoo.encoder(name)) / 1e6 == pytest.approx(ENCODERS[name], rel=0.005)


@pytest.mark.parametrize("name", [name for name in zoo.DECODERS if not name.startswith("d")])
def test_decoder_has_the_published_count(name):
    assert cost.decoder_params(zoo.decoder(name)) / 1e9 == pytest.approx(DECODERS[name], rel=0.005)


@pytest.mark.parametrize("name", NON_EMBEDDING)
def test_non_embedding_count_as_reported(name):
    got = cost.decoder_params(zoo.decoder(name), "excluded") / 1e9
    assert got == pytest.approx(NON_EMBEDDING[name], rel=0.01)  # the reports round to two digits


@pytest.mark.parametrize("name", zoo.ENCODERS)
def test_encoder_module_has_as_many_scalars_as_the_formula(name):
    spec = zoo.encoder(name)
    image = jax.ShapeDtypeStruct((1, spec.image_size, spec.image_size, 3), "float32")
    shapes = jax.eval_shape(Encoder(spec, COMPUTE).init, jax.random.key(0), image)
    assert count(shapes["params"]) == cost.encoder_params(spec)


@pytest.mark.parametrize("name", zoo.DECODERS)
def test_decoder_module_has_as_many_scalars_as_the_formula(name):
    spec = zoo.decoder(name)

    def init(key):
        text = jax.numpy.zeros((1, 2), "int32")
        return Decoder(spec, COMPUTE).init(key, text, AttentionMetadata(text, text, text))

    assert count(jax.eval_shape(init, jax.random.key(0))["params"]) == cost.decoder_params(spec)


def test_names_are_found_or_suggested():
    assert zoo.decoder("vicuna-7b") is zoo.decoder("llama2-7b")
    with pytest.raises(UserError, match=r"did you mean 'qwen2\.5-7b'"):
        zoo.decoder("qwen2.5-7")
    with pytest.raises(UserError, match="did you mean 'siglip-b16-224'"):
        zoo.encoder("siglip-b16-22")


def test_nominal_sizes_are_the_published_names():
    assert zoo.nominal_params("qwen1.5-1.8b") == 1.8e9
    assert zoo.nominal_params("smollm2-135m") == 135e6
    assert zoo.nominal_params("d48") == cost.decoder_params(zoo.decoder("d48"), "excluded")
