"""Sizes and costs of `compress.llava_mini`: the V it can give, FLOPs, published defaults."""

import dataclasses
import math

from vlm_jax.compress import flops
from vlm_jax.compress.contract import Cost, Count, without_mlp
from vlm_jax.core.specs import CompressorSpec, DecoderSpec, EncoderSpec


def defaults(name: str, encoder: EncoderSpec, decoder: DecoderSpec, tokens: int) -> CompressorSpec:
    """As published: eight heads at the encoder's width, four fusion layers of the decoder's heads and MLP."""
    heads = math.gcd(8, encoder.width)
    spec = CompressorSpec(name, tokens, encoder.token_grid, encoder.width, 0, decoder.width, encoder.width, heads, 4, 0)
    return for_decoder(spec, decoder)


def for_decoder(spec: CompressorSpec, decoder: DecoderSpec) -> CompressorSpec:
    """The spec with the fusion layers of another decoder."""
    heads = math.gcd(decoder.heads, decoder.width // 2)
    return dataclasses.replace(spec, text_width=decoder.width, mlp_width=decoder.mlp_width, fusion_heads=heads)


def problem(spec: CompressorSpec) -> str:
    if spec.fusion_heads < 1 or spec.text_width % (2 * spec.fusion_heads):
        return f"fusion_heads={spec.fusion_heads} must divide half of the decoder's width, {spec.text_width}"
    return without_mlp(spec)


def llava_mini_cost(spec: CompressorSpec, question_tokens: Count) -> Cost:
    patches, tokens, width = spec.grid[0] * spec.grid[1], spec.tokens, spec.text_width
    inner = (spec.width, spec.encoder_width, spec.encoder_width, spec.encoder_width)
    compressed = flops.attention_flops(tokens, patches, tokens * patches, *inner)
    length = patches + tokens + question_tokens
    layer = 2.0 * length * (4 * width**2 + 3 * width * spec.mlp_width) + 4.0 * length**2 * width
    return Cost(compressed, spec.depth * layer, projected=patches + tokens)
