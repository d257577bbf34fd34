"""`llava_mini` (LLaVA-Mini, arXiv 2501.03895): V = n x n queries attend to the patches at the encoder's width,

    z     = LN(x)
    y     = Attention(LN(query) + position, keys = z + position, values = z)        fixed sine and cosine positions

then patches and y are projected, and `spec.depth` layers of the language model's kind (`spec.fusion_heads` heads,
weights of their own, causal, no final norm) run over [P patches, V of y, the question]. The decoder reads the fused V
tokens, and the fused question in place of its embeddings, which get no gradient.

The fused question is given for the tokens of the bare question; the published code fuses the whole instruction. It
starts from a pretraining file; without one, all kernels start LeCun-normal here.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vlm_jax.compress import layers
from vlm_jax.compress.layers import Weights
from vlm_jax.compress.sizes.llava_mini import (  # noqa: F401
    defaults,
    for_decoder,
    llava_mini_cost,
    problem,
)
from vlm_jax.core.axes import EMBED, HEAD_DIM, HEADS, MLP, NORM, POSITION, VISION
from vlm_jax.core.specs import CompressorSpec
from vlm_jax.core.structs import Evidence, Prefix
from vlm_jax.ops import grid as g
from vlm_jax.ops import initializers as w
from vlm_jax.ops import rotary
from vlm_jax.ops.attention import attend
from vlm_jax.ops.logical_axes import AxisNames, gather_for_compute

_EPS, _RMS_EPS, _THETA = 1e-5, 1e-6, 10_000.0
_IN, _OUT = (EMBED, HEADS, HEAD_DIM), (HEADS, HEAD_DIM, EMBED)
_KERNELS: dict[str, AxisNames] = {
    "query": _IN, "key": _IN, "value": _IN, "out": _OUT, "gate": (EMBED, MLP), "up": (EMBED, MLP), "down": (MLP, EMBED)
}  # fmt: skip


def init_llava_mini(key: jax.Array, spec: CompressorSpec) -> Weights:
    queries, attention, *deep = jax.random.split(key, 2 + spec.depth)
    width = spec.encoder_width
    return {
        "queries": w.table(queries, (spec.tokens, width), (POSITION, VISION)),
        "query_norm": layers.init_norm(width),
        "patch_norm": layers.init_norm(width),
        "attention": layers.init_attention(attention, spec.width, spec.heads, width, width, width),
        **{f"fusion{i}": _init_layer(key, spec) for i, key in enumerate(deep)},
    }


def _init_layer(key: jax.Array, spec: CompressorSpec) -> Weights:
    width, inner = spec.text_width, spec.mlp_width
    heads = (spec.fusion_heads, width // spec.fusion_heads)
    shapes = {"query": (width, *heads), "out": (*heads, width), "gate": (width, inner), "down": (inner, width)}
    shapes |= {"key": shapes["query"], "value": shapes["query"], "up": shapes["gate"]}
    keys = dict(zip(_KERNELS, jax.random.split(key, len(_KERNELS)), strict=True))
    kernels = {
        name: w.dense(keys[name], shapes[name], names, inputs=2 if name == "out" else 1)
        for name, names in _KERNELS.items()
    }
    return {**kernels, "attention_norm": w.ones((width,), (NORM,)), "mlp_norm": w.ones((width,), (NORM,))}


def llava_mini(weights: Weights, evidence: Evidence, spec: CompressorSpec) -> Prefix:
    """Tokens [B, V, D] and the question [B, Q, D]."""
    x, mask, text, project = evidence.tokens, evidence.mask, evidence.question_tokens, evidence.project
    y = compress(weights, x, mask, spec)
    rows = jnp.concatenate([project(x), project(y), text.astype(x.dtype)], axis=1)
    patches, tokens = x.shape[1], spec.tokens
    valid = jnp.ones(x.shape[:2], bool) if mask is None else mask
    kept = jnp.broadcast_to(valid.any(1, keepdims=True), y.shape[:2])
    valid = jnp.concatenate([valid, kept, evidence.question_mask], axis=1)
    for i in range(spec.depth):
        rows = _layer(weights[f"fusion{i}"], rows, valid, spec)
    fused = jnp.where(evidence.question_mask[..., None], rows[:, patches + tokens :], text.astype(x.dtype))
    return Prefix(rows[:, patches : patches + tokens], None if mask is None else kept, fused)


def compress(
    weights: Weights, x: Float[Array, "B P E"], mask: Bool[Array, "B P"] | None, spec: CompressorSpec
) -> Float[Array, "B V E"]:
    """The V tokens before projection and fusion."""
    side = round(spec.tokens**0.5)
    positions = g.sincos((side, side), spec.encoder_width)
    z = layers.layer_norm(weights["patch_norm"], x, _EPS)
    queries = layers.layer_norm(weights["query_norm"], weights["queries"], _EPS) + positions
    queries = jnp.broadcast_to(queries.astype(x.dtype), (x.shape[0], *queries.shape))
    keys = z + jnp.asarray(g.resize(positions, (side, side), spec.grid), x.dtype)
    return layers.attention(weights["attention"], queries, keys, z, mask)


def _layer(
    weights: Weights, x: Float[Array, "B L D"], valid: Bool[Array, "B L"], spec: CompressorSpec
) -> Float[Array, "B L D"]:
    """A decoder layer: RMSNorm, rotary attention, gated MLP with SiLU."""

    def kernel(name: str) -> Array:
        return gather_for_compute(weights[name], _KERNELS[name], x.dtype)

    length, head_dim = x.shape[1], spec.text_width // spec.fusion_heads
    angle = rotary.angles(jnp.arange(length)[None], head_dim, _THETA)
    mask = jnp.tril(jnp.ones((length, length), bool)) & valid[:, None, None, :]
    y = _rms_norm(weights["attention_norm"], x)
    q, k, v = (jnp.einsum("bld,dnc->blnc", y, kernel(name)) for name in ("query", "key", "value"))
    angle = jnp.broadcast_to(angle, (x.shape[0], *angle.shape[1:]))
    mixed = attend(rotary.rotate(q, angle), rotary.rotate(k, angle), v, mask)
    x = x + jnp.einsum("blnc,ncd->bld", mixed, kernel("out"))
    y = _rms_norm(weights["mlp_norm"], x)
    return x + (jax.nn.silu(y @ kernel("gate")) * (y @ kernel("up"))) @ kernel("down")


def _rms_norm(scale: Float[Array, " D"], x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + _RMS_EPS) * scale).astype(x.dtype)
