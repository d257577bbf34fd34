"""What each rematerialisation policy keeps for the backward pass, and what it computes again.

A policy applies to every block. From the least recomputation to the least memory:

    none    everything that the backward pass reads is kept
    dots    the outputs of all products with weights are kept: attention is computed again
    mlp     the gate and up products are kept: attention and its four projections are computed again
    block   the input of a block alone is kept: the block is computed again, except its last product

The down projection of a block is computed again only where a norm follows it: nothing else reads its output. Products
of one width save the same FLOPs for each byte, so that keeping all of every n-th block is no better than "mlp", which
keeps about half of every block.
"""

from vlm_jax.core import specs
from vlm_jax.core.specs import DecoderSpec, EncoderSpec, RunSpec, StageSpec
from vlm_jax.sizing import compression, cost

POLICIES = ("none", "dots", "mlp", "block")


def recomputed_flops(spec: RunSpec, stage: StageSpec) -> float:
    """FLOPs of one training row that `spec.compute.remat` computes again. The logits are, under every policy."""
    policy, data = spec.compute.remat, specs.data_of(spec, stage)
    views, encoder = compression.views_of_row(spec, data), spec.model.encoder
    row = cost.row_pass(spec.model, data.row_tokens, views)
    total = row.head + row.layers * _decoder_share(spec.model.decoder, policy)
    total += row.attention if policy != "none" else 0.0
    return total + (views * _encoder_flops(encoder, policy) if "encoder" in stage.train else 0.0)


def _decoder_share(decoder: DecoderSpec, policy: str) -> float:
    """The part of a layer's products with weights that is computed again."""
    attention = decoder.width * decoder.head_dim * 2 * (decoder.heads + decoder.kv_heads)
    product = decoder.width * decoder.mlp_width
    down = product if decoder.sandwich_norm else 0
    again = {"none": 0, "dots": 0, "mlp": attention + down, "block": attention + 2 * product + down}[policy]
    return again / (attention + 3 * product)


def _encoder_flops(encoder: EncoderSpec, policy: str) -> float:
    """Of one image; blocks that merge tokens are not rematerialised."""
    if policy == "none" or encoder.merge:
        return 0.0
    tokens, width = encoder.patches + encoder.class_token, encoder.width
    weights = {"dots": 0, "mlp": 4 * width**2, "block": 4 * width**2 + width * encoder.mlp_width}[policy]
    return float(encoder.blocks * (2 * tokens * weights + 4 * tokens**2 * width))


def kept_bytes(spec: RunSpec, stage: StageSpec, policy: str, batch_shards: int, width_shards: int = 1) -> float:
    """Bytes that one device keeps of the decoder's blocks for the backward pass, at least. The batch is split over
    `batch_shards` devices, and heads and feed-forward over `width_shards`.
    """
    decoder, data = spec.model.decoder, specs.data_of(spec, stage)
    heads, keys, inner = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim, decoder.mlp_width
    whole = {"none": 4, "dots": 2, "mlp": 1, "block": 1}[policy] * decoder.width
    # Without recomputation the scores of plain attention are kept; a fused kernel has none.
    scores = decoder.heads * data.row_tokens if spec.compute.attention == "xla" else 0
    split = {"none": 2 * heads + 2 * keys + 4 * inner + scores, "dots": heads + 2 * keys + 2 * inner, "mlp": 2 * inner}
    whole += decoder.width if decoder.sandwich_norm and policy in ("none", "dots") else 0
    rows = data.batch_rows / spec.compute.microbatches / batch_shards
    entering = compression.alive(spec.model)
    positions = sum(
        layers * (data.row_tokens - compression.views_of_row(spec, data) * (entering[0][1] - tokens))
        for layers, tokens in entering
    )
    return rows * positions * (whole + split.get(policy, 0) / width_shards) * cost.dtype_bytes(spec.compute.dtype)
