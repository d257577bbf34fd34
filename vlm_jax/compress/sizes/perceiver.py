"""Sizes and costs of `compress.perceiver`: the V it can give, FLOPs, published defaults."""

from vlm_jax.compress import flops
from vlm_jax.compress.contract import Cost, Count
from vlm_jax.core.specs import CompressorSpec, DecoderSpec, EncoderSpec


def defaults(name: str, encoder: EncoderSpec, decoder: DecoderSpec, tokens: int) -> CompressorSpec:
    """As published: six layers, eight heads of 64 channels, an MLP of four times the encoder's width."""
    wide = 4 * encoder.width
    return CompressorSpec(name, tokens, encoder.token_grid, encoder.width, 0, decoder.width, 512, 8, 6, wide)


def perceiver_cost(spec: CompressorSpec, question_tokens: Count) -> Cost:
    tokens, width, keys = spec.tokens, spec.encoder_width, spec.grid[0] * spec.grid[1] + spec.tokens
    attention = flops.attention_flops(tokens, keys, tokens * keys, spec.width, width, width, width)
    return Cost(spec.depth * (attention + flops.mlp_flops(tokens, width, spec.mlp_width, width)))
