"""Axis letters and logical axis names.

Letters, the same in einsum, annotations and docstrings:

    B examples        H image side       P patches          V visual tokens kept
    T text tokens     L = V + T          E encoder width    D decoder width
    F feed-forward    N query heads      K key heads        C head channels
    W vocabulary      S cache slots      A tapped encoder layers

Logical names say what an axis is; `partitioning.py` maps them to mesh axes. Every rule table covers all `KERNEL_AXES`,
`COMPUTE_AXES` and `ACTIVATION_AXES`. A kernel has a storage axis and a compute axis: fsdp gathers it for the product.
"""

# Axes of parameters.
LAYERS = "layers"  # the stacked axis of a scan over blocks
PATCH = "patch"  # pixels of one patch
POSITION = "position"  # rows of a position table, learned queries
QUERIES = "queries"  # V, of a [V, N, P] bias
VISION = "vision"  # E, the residual stream of the encoder and compressor
VISION_HEADS = "vision_heads"
VISION_MLP = "vision_mlp"
EMBED = "embed"  # D, the residual stream of the decoder
HEADS = "heads"
KV_HEADS = "kv_heads"
HEAD_DIM = "head_dim"
MLP = "mlp"
VOCAB = "vocab"
NORM = "norm"  # scale and bias vectors
KERNEL_AXES = (
    LAYERS, PATCH, POSITION, QUERIES, VISION, VISION_HEADS, VISION_MLP,
    EMBED, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB, NORM,
)  # fmt: skip

# Axes of activations.
BATCH = "batch"
LENGTH = "length"
ACT_EMBED = "act_embed"
ACT_VISION = "act_vision"
ACT_VOCAB = "act_vocab"
ACT_HEADS = "act_heads"
LOOKUP = "lookup"  # B, during the embedding lookup
ACTIVATION_AXES = (BATCH, LENGTH, ACT_EMBED, ACT_VISION, ACT_VOCAB, ACT_HEADS, LOOKUP)


def compute_axis(name: str | None) -> str | None:
    """The logical name of a kernel axis during its matrix product."""
    return name and f"{name}_compute"


COMPUTE_AXES = tuple(f"{name}_compute" for name in KERNEL_AXES)
