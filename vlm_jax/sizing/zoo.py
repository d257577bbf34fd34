"""Specs of published encoders and decoders, by name. Sources are the config files of their checkpoints.

Names are lower case, `family-size`; encoders end in their resolution.
"""

from vlm_jax.core.errors import unknown
from vlm_jax.core.specs import CLIP_MEAN, CLIP_STD, DecoderSpec, EncoderSpec, RopeBands

# Positional sizes are the leading fields of the specs, (name, image_size, patch_size, width, depth, heads, mlp_width)
# of an encoder and (name, width, depth, heads, kv_heads, head_dim, mlp_width, vocab) of a decoder.


def _clip(*sizes: int | str) -> EncoderSpec:
    return EncoderSpec(
        *sizes,  # type: ignore[arg-type]
        activation="quick_gelu", class_token=True, patch_bias=False, pre_norm=True, pooling_head=False, norm_eps=1e-5,
        pixel_mean=CLIP_MEAN, pixel_std=CLIP_STD, resize="crop", interpolation="bicubic",
    )  # fmt: skip


def _ladder(width: int, vocab: int = 96) -> DecoderSpec:
    """A decoder of the built-in study: two layers, heads of 8 channels, a gated MLP of 8/3 the width."""
    heads = width // 8
    return DecoderSpec(f"d{width}", width, 2, heads, heads, 8, width * 8 // 3, vocab)


def _qwen2(*sizes: int | str, tied: bool, theta: float = 1e6, eps: float = 1e-6) -> DecoderSpec:
    return DecoderSpec(*sizes, tied_head=tied, qkv_bias=True, rope_theta=theta, norm_eps=eps)  # type: ignore[arg-type]


def _qwen3(*sizes: int | str, tied: bool) -> DecoderSpec:
    return DecoderSpec(*sizes, tied_head=tied, qk_norm=True, rope_theta=1e6)  # type: ignore[arg-type]


def _llama(*sizes: int | str, tied: bool, theta: float, **fields: object) -> DecoderSpec:
    return DecoderSpec(*sizes, tied_head=tied, rope_theta=theta, norm_eps=1e-5, **fields)  # type: ignore[arg-type]


def _llama3(*sizes: int | str, tied: bool, factor: float) -> DecoderSpec:
    """Llama 3.1 and 3.2: trained on 8192 positions, then extended."""
    return _llama(*sizes, tied=tied, theta=5e5, rope_factor=factor, rope_bands=RopeBands(1.0, 4.0, 8192))


def _gemma(*sizes: int | str, **fields: object) -> DecoderSpec:
    return DecoderSpec(*sizes, norm_plus_one=True, activation="gelu_tanh", scale_embedding=True, **fields)  # type: ignore[arg-type]


def _gemma2(*sizes: int | str, query_channels: int) -> DecoderSpec:
    return _gemma(
        *sizes, sandwich_norm=True, query_scale=query_channels**-0.5, attention_softcap=50.0, logit_softcap=30.0,
        window=4096, window_pattern=2,
    )  # fmt: skip


def _gemma3(*sizes: int | str, query_channels: int, window: int, factor: float) -> DecoderSpec:
    return _gemma(
        *sizes, sandwich_norm=True, qk_norm=True, query_scale=query_channels**-0.5, rope_theta=1e6, rope_factor=factor,
        local_rope_theta=1e4, window=window, window_pattern=6,
    )  # fmt: skip


ENCODERS = {spec.name: spec for spec in (
    EncoderSpec("glyph-64", 64, 8, 128, 4, 4, 512),
    EncoderSpec("siglip-b16-224", 224, 16, 768, 12, 12, 3072),
    EncoderSpec("siglip-b16-384", 384, 16, 768, 12, 12, 3072),
    EncoderSpec("siglip-l16-256", 256, 16, 1024, 24, 16, 4096),
    EncoderSpec("siglip-l16-384", 384, 16, 1024, 24, 16, 4096),
    EncoderSpec("siglip-so400m14-224", 224, 14, 1152, 27, 16, 4304),
    EncoderSpec("siglip-so400m14-384", 384, 14, 1152, 27, 16, 4304),
    EncoderSpec("siglip2-b16-224", 224, 16, 768, 12, 12, 3072),
    EncoderSpec("siglip2-b16-384", 384, 16, 768, 12, 12, 3072),
    EncoderSpec("siglip2-l16-384", 384, 16, 1024, 24, 16, 4096),
    EncoderSpec("siglip2-so400m14-224", 224, 14, 1152, 27, 16, 4304),
    EncoderSpec("siglip2-so400m14-384", 384, 14, 1152, 27, 16, 4304),
    EncoderSpec("siglip2-so400m16-384", 384, 16, 1152, 27, 16, 4304),
    EncoderSpec("siglip2-g16-384", 384, 16, 1536, 40, 16, 6144),
    _clip("clip-l14-224", 224, 14, 1024, 24, 16, 4096),
    _clip("clip-l14-336", 336, 14, 1024, 24, 16, 4096),
)}  # fmt: skip

DECODERS = {spec.name: spec for spec in (
    *map(_ladder, (8, 16, 24, 32, 48, 64, 96, 192, 384)),
    _qwen2("qwen1.5-0.5b", 1024, 24, 16, 16, 64, 2816, 151936, tied=True),
    _qwen2("qwen1.5-1.8b", 2048, 24, 16, 16, 128, 5504, 151936, tied=False),
    _qwen2("qwen1.5-4b", 2560, 40, 20, 20, 128, 6912, 151936, tied=False, theta=5e6),
    _qwen2("qwen1.5-7b", 4096, 32, 32, 32, 128, 11008, 151936, tied=False),
    _qwen2("qwen1.5-14b", 5120, 40, 40, 40, 128, 13696, 152064, tied=False),
    _qwen2("qwen1.5-32b", 5120, 64, 40, 8, 128, 27392, 152064, tied=False),
    _qwen2("qwen1.5-72b", 8192, 80, 64, 64, 128, 24576, 152064, tied=False),
    _qwen2("qwen2.5-0.5b", 896, 24, 14, 2, 64, 4864, 151936, tied=True),
    _qwen2("qwen2.5-1.5b", 1536, 28, 12, 2, 128, 8960, 151936, tied=True),
    _qwen2("qwen2.5-3b", 2048, 36, 16, 2, 128, 11008, 151936, tied=True),
    _qwen2("qwen2.5-7b", 3584, 28, 28, 4, 128, 18944, 152064, tied=False),
    _qwen2("qwen2.5-14b", 5120, 48, 40, 8, 128, 13824, 152064, tied=False, eps=1e-5),
    _qwen2("qwen2.5-32b", 5120, 64, 40, 8, 128, 27648, 152064, tied=False, eps=1e-5),
    _qwen2("qwen2.5-72b", 8192, 80, 64, 8, 128, 29568, 152064, tied=False, eps=1e-5),
    _qwen3("qwen3-0.6b", 1024, 28, 16, 8, 128, 3072, 151936, tied=True),
    _qwen3("qwen3-1.7b", 2048, 28, 16, 8, 128, 6144, 151936, tied=True),
    _qwen3("qwen3-4b", 2560, 36, 32, 8, 128, 9728, 151936, tied=True),
    _qwen3("qwen3-8b", 4096, 36, 32, 8, 128, 12288, 151936, tied=False),
    _qwen3("qwen3-14b", 5120, 40, 40, 8, 128, 17408, 151936, tied=False),
    _qwen3("qwen3-32b", 5120, 64, 64, 8, 128, 25600, 151936, tied=False),
    _llama("llama2-7b", 4096, 32, 32, 32, 128, 11008, 32000, tied=False, theta=1e4),
    _llama("llama2-13b", 5120, 40, 40, 40, 128, 13824, 32000, tied=False, theta=1e4),
    _llama3("llama3.2-1b", 2048, 16, 32, 8, 64, 8192, 128256, tied=True, factor=32.0),
    _llama3("llama3.2-3b", 3072, 28, 24, 8, 128, 8192, 128256, tied=True, factor=32.0),
    _llama3("llama3.1-8b", 4096, 32, 32, 8, 128, 14336, 128256, tied=False, factor=8.0),
    _llama3("llama3.1-70b", 8192, 80, 64, 8, 128, 28672, 128256, tied=False, factor=8.0),
    _gemma("gemma-2b", 2048, 18, 8, 1, 256, 16384, 256000),
    _gemma("gemma-7b", 3072, 28, 16, 16, 256, 24576, 256000),
    _gemma2("gemma2-2b", 2304, 26, 8, 4, 256, 9216, 256000, query_channels=256),
    _gemma2("gemma2-9b", 3584, 42, 16, 8, 256, 14336, 256000, query_channels=256),
    _gemma2("gemma2-27b", 4608, 46, 32, 16, 128, 36864, 256000, query_channels=144),
    _gemma3("gemma3-1b", 1152, 26, 4, 1, 256, 6912, 262144, query_channels=256, window=512, factor=1.0),
    _gemma3("gemma3-4b", 2560, 34, 8, 4, 256, 10240, 262208, query_channels=256, window=1024, factor=8.0),
    _gemma3("gemma3-12b", 3840, 48, 16, 8, 256, 15360, 262208, query_channels=256, window=1024, factor=8.0),
    _gemma3("gemma3-27b", 5376, 62, 32, 16, 128, 21504, 262208, query_channels=168, window=1024, factor=8.0),
    _llama("smollm2-135m", 576, 30, 9, 3, 64, 1536, 49152, tied=True, theta=1e5),
    _llama("smollm2-360m", 960, 32, 15, 5, 64, 2560, 49152, tied=True, theta=1e5),
    _llama("smollm2-1.7b", 2048, 24, 32, 32, 64, 8192, 49152, tied=True, theta=1.3e5),
)}  # fmt: skip
ALIASES = {"vicuna-7b": "llama2-7b", "vicuna-13b": "llama2-13b"}  # the same dimensions under another name


def encoder(name: str) -> EncoderSpec:
    """The encoder of that name. Raises `UserError` with a suggestion."""
    if name not in ENCODERS:
        raise unknown("encoder", name, ENCODERS)
    return ENCODERS[name]


def decoder(name: str) -> DecoderSpec:
    """The decoder of that name or alias. Raises `UserError` with a suggestion."""
    name = ALIASES.get(name, name)
    if name not in DECODERS:
        raise unknown("llm", name, (*DECODERS, *ALIASES))
    return DECODERS[name]


def family(name: str) -> str:
    """Model family of a decoder: "qwen1.5-7b" -> "qwen1.5"; "d" is the built-in study's."""
    return name.rpartition("-")[0] or name.rstrip("0123456789")


def nominal_params(name: str) -> float:
    """Parameters by the published name, "qwen1.5-7b" -> 7e9; the built-in study's are non-embedding parameters.

    Published scores list models by this size, so a law fitted to them takes it as N.
    """
    from vlm_jax.sizing.cost import decoder_params

    spec = decoder(name)
    size = name.rpartition("-")[2]
    scale = {"b": 1e9, "m": 1e6}.get(size[-1:])
    return float(size[:-1]) * scale if scale else float(decoder_params(spec, "excluded"))
