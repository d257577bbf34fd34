"""Sizes and costs of `compress.qformer`: the V it can give, FLOPs, published defaults."""

from vlm_jax.compress import flops
from vlm_jax.compress.contract import Cost, Count
from vlm_jax.core.specs import CompressorSpec, DecoderSpec, EncoderSpec

CROSS_EVERY = 2


def defaults(name: str, encoder: EncoderSpec, decoder: DecoderSpec, tokens: int) -> CompressorSpec:
    """As published: BERT's sizes, width 768, 12 heads, 12 layers."""
    return CompressorSpec(name, tokens, encoder.token_grid, encoder.width, 0, decoder.width, 768, 12, 12, 3072)


def qformer_cost(spec: CompressorSpec, question_tokens: Count) -> Cost:
    return Cost(_flops(spec, 0))


def with_question_cost(spec: CompressorSpec, question_tokens: Count) -> Cost:
    return Cost(0.0, _flops(spec, question_tokens))


def _flops(spec: CompressorSpec, text: Count) -> float:
    tokens, width, patches = spec.tokens, spec.width, spec.grid[0] * spec.grid[1]
    length = tokens + text
    attention = flops.attention_flops(length, length, length * length, width, width)
    cross = flops.attention_flops(tokens, patches, tokens * patches, width, width, key_inputs=spec.encoder_width)
    mlps = flops.mlp_flops(tokens * spec.depth + text * (spec.depth - 1), width, spec.mlp_width, width)
    text_in = flops.linear_flops(text, spec.text_width, width)
    return text_in + spec.depth * attention + -(-spec.depth // CROSS_EVERY) * cross + mlps
