"""big_vision's `.npz` checkpoints, arrays under slash-joined names: the image tower of SigLIP, with or without its text
tower, and PaliGemma (image tower, linear head, Gemma).

Blocks are unrolled (`encoderblock_3/...`) or, for models trained with scan, stacked as ours (`encoderblock/...`); both
are read. There is no config file: sizes are read from the shapes, the rest (softcaps, rope_theta) from the family.
"""

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.checkpoints.info import CheckpointInfo
from vlm_jax.checkpoints.tensor_files import TensorFiles, open_weights
from vlm_jax.checkpoints.tensor_tables import Leaf, TensorTable, load_params, same, tensors
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import atomic_write
from vlm_jax.core.specs import ComputeSpec, DecoderSpec, EncoderSpec, ModelSpec
from vlm_jax.models.vision import Encoder
from vlm_jax.sizing import zoo

# Optimizer state, counters, the text tower with its temperature and bias.
_IGNORED = (r"opt/.*", r"(?:.*/)?(?:chrono|states)/.*", r"(?:.*/)?txt/.*", r"(?:params/)?[tb]")
UNROLLED, STACKED = "encoderblock_{i}", "encoderblock"
_FIRST = "embedding/kernel"
_ATTENTION = "MultiHeadDotProductAttention_0"


def load_encoder(path: str | Path, spec: EncoderSpec) -> dict[str, Any]:
    """Parameters of `models.vision.Encoder` (float32, numpy) from a `.npz`. Raises `UserError` for a missing or corrupt
    file, or tensors that do not fit the spec.
    """
    weights = open_weights(path)
    root, block = tower(weights)
    encoder = Encoder(spec, ComputeSpec("float32", "none", "xla", 1, "replicated", (1, 1, 1)))
    image = jax.ShapeDtypeStruct((1, spec.image_size, spec.image_size, 3), jnp.float32)
    boxed = jax.eval_shape(encoder.init, jax.random.key(0), image)["params"]
    pool = () if spec.pooling_head else (f"{root}MAPHead_0/.*",)
    ignore = (*_IGNORED, f"{root}head/.*", f"{root}pre_logits/.*", *pool)
    return jax.device_get(load_params(weights, encoder_table(spec, root, block), boxed, None, "float32", ignore))


def save_encoder(path: str | Path, params: Mapping[str, Any], spec: EncoderSpec) -> None:
    """Writes the encoder as the image side (`params/img/...`) of a big_vision checkpoint."""
    write_npz(Path(path), tensors(params, encoder_table(spec, "params/img/", UNROLLED)))


def export_tables(spec: ModelSpec) -> dict[str, TensorTable]:
    """Part -> table of an image tower, or of PaliGemma, whose logits are ours without Gemma 2's final softcap. Raises
    `UserError` for any other model.
    """
    decoder, encoder = spec.decoder, spec.encoder
    if encoder is None:
        raise UserError("expected a model with an encoder for a .npz, got a language model")
    if decoder is None:
        return {"encoder": encoder_table(encoder, "params/img/", UNROLLED)}
    is_gemma = decoder.norm_plus_one and decoder.tied_head and not (decoder.qk_norm or decoder.qkv_bias)
    fits = {
        f"compressor {spec.compressor.name}": spec.compressor.name == "none",
        f"projector {spec.projector}": spec.projector == "linear",
        f"mask {spec.mask}": spec.mask == "prefix",
        f"language model {decoder.name}": is_gemma and decoder.rope_theta == 1e4 and decoder.rope_factor == 1,
        f"feature layer {encoder.feature_layer}": encoder.feature_layer == 0,
        f"activation {encoder.activation}": encoder.activation == "gelu_tanh",
    }
    wrong = ", ".join(name for name, fit in fits.items() if not fit)
    if wrong:
        raise UserError(f"{wrong}: expected big_vision's PaliGemma, SigLIP with a linear projector and Gemma 1 or 2")
    return {
        "encoder": encoder_table(encoder, "params/img/", STACKED),
        "connector": projector_table(encoder, decoder, "params/img/"),
        "decoder": decoder_table(decoder, "params/llm/"),
    }


def write_npz(path: Path, named: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes numpy's archive atomically, with one array in memory at a time."""
    with atomic_write(path) as new, zipfile.ZipFile(new, "w", zipfile.ZIP_STORED) as archive:
        for name, array in named:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)


def inspect_npz(weights: TensorFiles) -> CheckpointInfo:
    """The specs and tables of a checkpoint: PaliGemma where it has an `llm`, else the image tower."""
    root, block = tower(weights)
    encoder = _encoder_spec(weights, root, block)
    tables = {"encoder": encoder_table(encoder, root, block)}
    body = f"{root.removesuffix('img/')}llm/"
    if f"{body}embedder/input_embedding" not in weights.shapes:
        ignore = (*_IGNORED, f"{root}head/.*", f"{root}pre_logits/.*")
        return CheckpointInfo("big_vision ViT", encoder, None, None, "causal", None, tables, weights, {}, ignore)
    decoder = _decoder_spec(weights, body)
    tables |= {
        "connector": projector_table(encoder, decoder, root),
        "decoder": decoder_table(decoder, body),
    }
    # big_vision has no image token; Hugging Face's is the first id after this vocabulary.
    kind, token = "big_vision PaliGemma", decoder.vocab
    return CheckpointInfo(kind, encoder, "linear", decoder, "prefix", token, tables, weights, {}, _IGNORED)


def tower(weights: TensorFiles) -> tuple[str, str]:
    """(prefix of the image tower's names, `UNROLLED` or `STACKED`)."""
    roots = [name.removesuffix(_FIRST) for name in weights.shapes if name.endswith(_FIRST) and "txt/" not in name]
    if not roots:
        raise UserError(f"{weights.path}: no image tower (expected a tensor that ends in {_FIRST})")
    root = min(roots, key=len)
    stacked = f"{root}Transformer/{STACKED}/LayerNorm_0/scale" in weights.shapes
    return root, STACKED if stacked else UNROLLED


def encoder_table(spec: EncoderSpec, root: str, block: str) -> TensorTable:
    """Every parameter of `models.vision.Encoder` under big_vision's names; `block` is `UNROLLED` or `STACKED`."""
    width, patch = spec.width, spec.patch_size
    if spec.class_token or spec.pre_norm:
        raise UserError(f"encoder {spec.name}: big_vision's files hold SigLIP, not CLIP")
    table = {
        "patch/kernel": same(f"{root}{_FIRST}", (patch, patch, 3, width)),
        "position": same(f"{root}pos_embedding", (1, spec.patches, width)),
    }
    if spec.patch_bias:
        table["patch/bias"] = same(f"{root}embedding/bias", (width,))
    norm = {"scale": (width,), "bias": (width,)}
    if not spec.feature_layer:
        table |= _leaves("norm", f"{root}Transformer/encoder_norm", norm)
    mixing = [("attention", _ATTENTION, _attention_shapes(spec)), *_mlp_shapes(spec)]
    hf_name = f"{root}Transformer/{block}/"
    for path, name, shapes in (
        ("attention_norm", "LayerNorm_0", norm), ("mlp_norm", "LayerNorm_1", norm), *mixing,
    ):  # fmt: skip
        table |= _leaves(f"blocks/{path}", hf_name + name, shapes, spec.blocks)
    if spec.pooling_head:
        pool = f"{root}MAPHead_0/"
        for path, name, shapes in (("norm", "LayerNorm_0", norm), *mixing):
            table |= _leaves(f"pooling/{path}", pool + name, shapes)
        table["pooling/probe"] = same(f"{pool}probe", (1, 1, width))
    return table


def _attention_shapes(spec: EncoderSpec) -> dict[str, tuple[int, ...]]:
    heads, width = (spec.heads, spec.width // spec.heads), spec.width
    inner = {f"{name}/{leaf}": shape for name in ("query", "key", "value")
             for leaf, shape in (("kernel", (width, *heads)), ("bias", heads))}  # fmt: skip
    return {**inner, "out/kernel": (*heads, width), "out/bias": (width,)}


def _mlp_shapes(spec: EncoderSpec) -> list[tuple[str, str, dict[str, tuple[int, ...]]]]:
    up = {"kernel": (spec.width, spec.mlp_width), "bias": (spec.mlp_width,)}
    down = {"kernel": (spec.mlp_width, spec.width), "bias": (spec.width,)}
    return [("mlp/up", "MlpBlock_0/Dense_0", up), ("mlp/down", "MlpBlock_0/Dense_1", down)]


def _leaves(path: str, hf_name: str, shapes: Mapping[str, tuple[int, ...]], blocks: int = 0) -> TensorTable:
    """Rows for arrays of the same shape in both; one tensor for each block where `hf_name` has "{i}", else stacked."""
    stacked = blocks if "{i}" not in hf_name else 0
    full = {name: (stacked, *shape) if stacked else shape for name, shape in shapes.items()}
    return {f"{path}/{name}": same(f"{hf_name}/{name}", full[name], blocks - stacked) for name in shapes}


def projector_table(encoder: EncoderSpec, decoder: DecoderSpec, root: str) -> TensorTable:
    """PaliGemma's linear projector, the head of the image tower."""
    return {
        "projector/kernel": same(f"{root}head/kernel", (encoder.width, decoder.width)),
        "projector/bias": same(f"{root}head/bias", (decoder.width,)),
    }


def decoder_table(spec: DecoderSpec, root: str) -> TensorTable:
    """Every parameter of `models.decoder.Decoder` under Gemma's names, blocks stacked."""
    layers, width, inner, n = f"{root}layers/", spec.width, spec.mlp_width, spec.depth
    q, kv = (n, spec.heads, width, spec.head_dim), (n, spec.kv_heads, width, spec.head_dim)

    def heads(hf_name: str, shape: tuple[int, ...], k: int, of: int) -> Leaf:
        """[layers, (of,) heads, D, C] -> [layers, D, heads, C]."""
        stacked = (n, of, *shape[1:]) if of > 1 else shape
        return Leaf(f"{layers}attn/{hf_name}/w", stacked, shape, (0, 2, 1, 3), part=(1, k, of) if of > 1 else None)

    if spec.heads == spec.kv_heads:
        query, key, value = (heads("qkv_einsum", q, k, 3) for k in range(3))
    else:
        query, key, value = heads("q_einsum", q, 0, 1), heads("kv_einsum", kv, 0, 2), heads("kv_einsum", kv, 1, 2)
    gating = Leaf(f"{layers}mlp/gating_einsum", (n, 2, width, inner), (n, width, inner), (0, 1, 2))
    norms = {"attention_norm": "pre_attention_norm", "mlp_norm": "pre_ffw_norm"}
    if spec.sandwich_norm:
        norms |= {"attention_post_norm": "post_attention_norm", "mlp_post_norm": "post_ffw_norm"}
    return {
        "embedding": same(f"{root}embedder/input_embedding", (spec.vocab, width)),
        "norm/scale": same(f"{root}final_norm/scale", (width,)),
        "blocks/attention/query/kernel": query,
        "blocks/attention/key/kernel": key,
        "blocks/attention/value/kernel": value,
        "blocks/attention/out/kernel": same(
            f"{layers}attn/attn_vec_einsum/w", (n, spec.heads, spec.head_dim, width)
        ),
        "blocks/mlp/gate/kernel": gating._replace(part=(1, 0, 2)),
        "blocks/mlp/up/kernel": gating._replace(part=(1, 1, 2)),
        "blocks/mlp/down/kernel": same(f"{layers}mlp/linear", (n, inner, width)),
        **{f"blocks/{name}/scale": same(f"{layers}{hf_name}/scale", (n, width)) for name, hf_name in norms.items()},
    }  # fmt: skip


def _shape(weights: TensorFiles, name: str, axes: int) -> tuple[int, ...]:
    shape = weights.shapes.get(name, ((), None))[0]
    if len(shape) != axes:
        actual = f"shape {list(shape)}" if name in weights.shapes else "none"
        raise UserError(f"{weights.path}: {name}: expected an array of {axes} axes, got {actual}")
    return shape


def _encoder_spec(weights: TensorFiles, root: str, block: str) -> EncoderSpec:
    patch, _, _, width = _shape(weights, f"{root}{_FIRST}", 4)
    side = round(_shape(weights, f"{root}pos_embedding", 3)[1] ** 0.5)
    first = f"{root}Transformer/{block}/".replace("{i}", "0")
    axis = 1 if block == STACKED else 0
    heads = _shape(weights, f"{first}{_ATTENTION}/query/kernel", 3 + axis)[1 + axis]
    inner = _shape(weights, f"{first}MlpBlock_0/Dense_0/kernel", 2 + axis)[1 + axis]
    norms = [n for n in weights.shapes if n.startswith(f"{root}Transformer/") and n.endswith("LayerNorm_0/scale")]
    depth = weights.shapes[norms[0]][0][0] if block == STACKED else len(norms)
    pool = f"{root}MAPHead_0/probe" in weights.shapes
    name = f"siglip-{width}x{depth}-{patch}-{side * patch}"
    return EncoderSpec(name, side * patch, patch, width, depth, heads, inner, pooling_head=pool)


def _decoder_spec(weights: TensorFiles, root: str) -> DecoderSpec:
    """Gemma's spec from the shapes. As in big_vision's PaliGemma, Gemma 2 has no sliding windows and no final softcap
    (which does not change greedy decoding).
    """
    vocab, width = _shape(weights, f"{root}embedder/input_embedding", 2)
    depth, heads, head_dim, _ = _shape(weights, f"{root}layers/attn/attn_vec_einsum/w", 4)
    inner = _shape(weights, f"{root}layers/mlp/linear", 3)[1]
    grouped = f"{root}layers/attn/kv_einsum/w"
    kv_heads = _shape(weights, grouped, 5)[2] if grouped in weights.shapes else heads
    is_gemma2 = f"{root}layers/post_attention_norm/scale" in weights.shapes
    sizes = (width, depth, heads, kv_heads, head_dim, inner)
    known = [s for s in zoo.DECODERS.values() if s.name.startswith("gemma") and sizes == _sizes(s)]
    return DecoderSpec(
        known[0].name if known else f"gemma{2 if is_gemma2 else ''}-{width}x{depth}", *sizes, vocab,
        sandwich_norm=is_gemma2, norm_plus_one=True, activation="gelu_tanh", scale_embedding=True,
        query_scale=known[0].query_scale if known else None,  # Gemma 2 27B has sqrt(D / N)
        attention_softcap=50.0 if is_gemma2 else None, context=8192,
    )  # fmt: skip


def _sizes(spec: DecoderSpec) -> tuple[int, ...]:
    return spec.width, spec.depth, spec.heads, spec.kv_heads, spec.head_dim, spec.mlp_width
