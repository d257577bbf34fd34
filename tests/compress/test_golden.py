"""Trained compressors against the official code."""

import numpy as np
import pytest

from tests.compress import official as ref
from vlm_jax.core.specs import CompressorSpec


def spec_of(name, x, tokens, width=0, heads=1, depth=1, mlp_width=0, decoder=1, taps=0, grid=None, **fields):
    grid = grid or ref.side(x.shape[1])
    inner = width or x.shape[2]
    return CompressorSpec(name, tokens, grid, x.shape[2], taps, decoder, inner, heads, depth, mlp_width, **fields)


def cells(arrays, attention, heads, **names):
    """Weights that TokenPacker and QueCC share."""
    own = {"attention": ref.attention(arrays, attention, heads)}
    for name, (mlp_up, mlp_down, norm) in names.items():
        own[name] = {"up": ref.linear(arrays, mlp_up), "down": ref.linear(arrays, mlp_down)}
        own[f"{name}_norm"] = ref.norm(arrays, norm)
    return own


def taps_of(arrays):
    """Layers side by side [B, P, A E] -> [B, A, P, E]."""
    x, multi = arrays["x"], arrays["multi"]
    return np.moveaxis(multi.reshape(*x.shape[:2], -1, x.shape[2]), 2, 1)


def test_golden_tokenpacker():
    arrays = ref.read("tokenpacker")
    x, w, taps = arrays["x"], ref.under(arrays, "w."), taps_of(arrays)
    weights = {
        "query": ref.linear(w, "q_proj_1"),
        "query_norm": ref.norm(w, "ln_q_1"),
        **cells(
            w, "clip_attn", 8,
            keys=("k_proj_1.0", "k_proj_1.2", "ln_k_1"), values=("v_proj_1.0", "v_proj_1.2", "ln_v_1"),
        ),
    }  # fmt: skip
    for tokens, expected in ref.outputs(arrays).items():
        spec = spec_of("tokenpacker", x, tokens, heads=8, taps=taps.shape[1])
        out = ref.run(spec, weights, tokens=x, taps=taps)
        ref.close(ref.projector(w, "mlp.0", "mlp.2")(out.tokens), expected)


def test_golden_quecc():
    arrays = ref.read("quecc")
    x, taps, text = arrays["x"], taps_of(arrays), arrays["text"]
    for tokens, expected in ref.outputs(arrays).items():
        w = ref.under(arrays, f"w{tokens}.")
        names = {"keys": ("k_proj.0", "k_proj.2", "k_proj.3"), "values": ("v_proj.0", "v_proj.2", "v_proj.3")}
        weights = {
            "text": ref.linear(w, "text_projection.0"),
            "text_norm": ref.norm(w, "text_projection.1"),
            "query": {"up": ref.linear(w, "q_proj.0"), "down": ref.linear(w, "q_proj.2")},
            "query_norm": ref.norm(w, "q_proj.3"),
            "down": ref.depthwise(w, "q_downsample"),
            **cells(w, "clip_attn", 8, **names),
        }
        spec = spec_of("quecc", x, tokens, heads=8, taps=taps.shape[1], decoder=text.shape[1])
        out = ref.run(spec, weights, tokens=x, taps=taps, question_vector=text)
        ref.close(ref.projector(ref.under(arrays, "wp."), "0", "2")(out.tokens), expected)


def test_golden_m3():
    arrays = ref.read("m3")
    x, project = arrays["x"], ref.projector(arrays, "w.0", "w.2")
    for tokens, expected in ref.outputs(arrays).items():
        ref.close(ref.run(spec_of("m3", x, tokens), {}, project, tokens=x).tokens, expected)


def test_golden_pixel_shuffle():
    arrays = ref.read("pixel_shuffle")
    x, v2, w = arrays["x"], arrays["v2"], ref.under(arrays, "w.")
    batch, *grid, _ = x.shape
    flat, cells = x.reshape(batch, -1, x.shape[-1]), v2.reshape(batch, -1, v2.shape[-1])
    shuffled = ref.run(spec_of("idefics3", flat, cells.shape[1], grid=tuple(grid)), {}, tokens=flat)
    ref.close(shuffled.tokens, cells)
    spec = spec_of("pixel_shuffle", flat, cells.shape[1], grid=tuple(grid))
    normed = ref.run(spec, {"norm": ref.norm(w, "0")}, tokens=flat)
    ref.close(ref.projector(w, "1", "3")(normed.tokens), arrays["mlp_out"])
    y, expected = arrays["y"], arrays["idefics"]
    ref.close(ref.run(spec_of("idefics3", y, expected.shape[1]), {}, tokens=y).tokens, expected)


@pytest.mark.parametrize(("inputs", "output"), [("x", "out"), ("small", "small_out")])
def test_golden_ldpv2(inputs, output):
    arrays = ref.read("ldpv2")
    x, expected = arrays[inputs], arrays[output]
    project = ref.projector(arrays, "w.mlp.mlp.0", "w.mlp.mlp.2")
    spec = spec_of("ldpv2", x, expected.shape[1], decoder=expected.shape[2])
    weights = {"conv": ref.depthwise(arrays, "w.peg.peg.0")}
    ref.close(ref.run(spec, weights, project, tokens=x).tokens, expected)


def test_golden_c_abstractor():
    arrays = ref.read("c_abstractor")
    x, expected, w = arrays["x"], arrays["out"], ref.under(arrays, "w.")
    width = len(w["net.2.b1.conv1.conv.weight"])
    depth = sum(name.startswith("net.0.") and name.endswith(".se.fc1.bias") for name in w)

    def convolution(name):
        return {"linear": ref.linear(w, f"{name}.conv"), "norm": ref.norm(w, f"{name}.bn")}

    def block(name):
        own = {
            "first": convolution(f"{name}.conv1"),
            "conv": ref.depthwise(w, f"{name}.conv2.conv"),
            "conv_norm": ref.norm(w, f"{name}.conv2.bn"),
            "squeeze": ref.linear(w, f"{name}.se.fc1"),
            "excite": ref.linear(w, f"{name}.se.fc2"),
            "last": convolution(f"{name}.conv3"),
        }
        shortcut = f"{name}.downsample"
        return own | ({"shortcut": convolution(shortcut)} if f"{shortcut}.conv.weight" in w else {})

    stages = {"fine": "net.0", "coarse": "net.2"}
    weights = {
        "positions": w["pos_emb"][0],
        **{stage: {f"block{i}": block(f"{net}.b{i + 1}") for i in range(depth)} for stage, net in stages.items()},
    }
    spec = spec_of("c_abstractor", x, expected.shape[1], width=width, depth=depth)
    out = np.asarray(ref.run(spec, weights, tokens=x).tokens)
    inner = out @ w["readout.0.weight"].T + w["readout.0.bias"]
    ref.close(inner / (1 + np.exp(-inner)) @ w["readout.2.weight"].T + w["readout.2.bias"], expected)


def test_golden_perceiver():
    arrays = ref.read("perceiver")
    x, expected, w = arrays["x"], arrays["out"], ref.under(arrays, "w.")
    heads, depth = 3, sum(name.endswith("to_q.weight") for name in w)

    def layer(name):
        key, value = np.split(w[f"{name}.0.to_kv.weight"], 2)
        kernels = {"query": w[f"{name}.0.to_q.weight"], "key": key, "value": value}
        attention = {part: ref.to_heads({"kernel": kernel.T}, heads) for part, kernel in kernels.items()}
        return {
            "media_norm": ref.norm(w, f"{name}.0.norm_media"),
            "latent_norm": ref.norm(w, f"{name}.0.norm_latents"),
            "attention": attention | {"out": ref.from_heads(ref.linear(w, f"{name}.0.to_out"), heads)},
            "mlp_norm": ref.norm(w, f"{name}.1.0"),
            "mlp": {"up": ref.linear(w, f"{name}.1.1"), "down": ref.linear(w, f"{name}.1.3")},
        }

    weights = {
        "latents": w["latents"],
        **{f"layer{i}": layer(f"layers.{i}") for i in range(depth)},
        "norm": ref.norm(w, "norm"),
    }
    inner = len(w["layers.0.0.to_q.weight"])
    spec = spec_of("perceiver", x, expected.shape[1], inner, heads, depth, grid=(1, x.shape[1]))
    ref.close(ref.run(spec, weights, tokens=x).tokens, expected)


def qformer_weights(w, heads, depth):
    def attention(name):
        inward = {
            part: ref.to_heads(ref.linear(w, f"{name}.attention.{part}"), heads) for part in ("query", "key", "value")
        }
        return inward | {"out": ref.from_heads(ref.linear(w, f"{name}.output.dense"), heads)}

    def mlp(name, kind, ending):
        up, down = f"{name}.intermediate{ending}.dense", f"{name}.output{ending}.dense"
        own = {"up": ref.linear(w, up), "down": ref.linear(w, down)}
        return {kind: own, f"{kind}_norm": ref.norm(w, f"{name}.output{ending}.LayerNorm")}

    def layer(name):
        own = {
            "attention": attention(f"{name}.attention"),
            "attention_norm": ref.norm(w, f"{name}.attention.output.LayerNorm"),
            **mlp(name, "mlp", "_query"),
        }
        if f"{name}.crossattention.attention.query.weight" in w:
            own["cross"] = attention(f"{name}.crossattention")
            own["cross_norm"] = ref.norm(w, f"{name}.crossattention.output.LayerNorm")
        if f"{name}.intermediate.dense.weight" in w:
            own |= mlp(name, "text_mlp", "")
        return own

    return {f"layer{i}": layer(f"encoder.layer.{i}") for i in range(depth)}


def test_golden_qformer():
    arrays = ref.read("qformer")
    x, queries, heads = arrays["x"], arrays["queries"][0], 3
    depth = sum(name.startswith("w.") and name.endswith("intermediate_query.dense.bias") for name in arrays)
    inner = len(arrays["w.encoder.layer.0.intermediate_query.dense.bias"])
    sizes = (len(queries), queries.shape[1], heads, depth, inner)
    fields = {"decoder": queries.shape[1], "grid": (1, x.shape[1])}
    w = ref.under(arrays, "w.")
    weights = {"queries": queries, "norm": ref.norm(w, "layernorm"), **qformer_weights(w, heads, depth)}
    ref.close(ref.run(spec_of("qformer", x, *sizes, **fields), weights, tokens=x).tokens, arrays["out"])

    w, ids = ref.under(arrays, "wt."), arrays["ids"]
    words, positions = (w[f"embeddings.{part}_embeddings.weight"] for part in ("word", "position"))
    weights = {
        "queries": queries,
        "norm": ref.norm(w, "embeddings.layernorm"),
        "text": {"kernel": np.eye(queries.shape[1]), "bias": np.zeros(queries.shape[1])},
        "text_positions": np.pad(positions, ((0, 512 - len(positions)), (0, 0))),
        **qformer_weights(w, heads, depth),
    }
    spec = spec_of("qformer_question", x, *sizes, **fields)
    question = {"question_tokens": words[ids], "question_mask": arrays["real"] > 0}
    ref.close(ref.run(spec, weights, tokens=x, **question).tokens, arrays["text_out"])


def test_golden_mqt():
    arrays = ref.read("mqt")
    x, w, heads = arrays["x"], ref.under(arrays, "w."), 2
    weights = {
        "queries": w["query"],
        **{f"{ours}_norm": ref.norm(w, f"ln_{ours[0]}") for ours in ("query", "key", "value")},
        "attention": ref.attention(w, "attn", heads),
    }
    for tokens, expected in ref.outputs(arrays).items():
        spec = spec_of("mqt", x, tokens, heads=heads, queries=len(w["query"]))
        ref.close(np.asarray(ref.run(spec, weights, tokens=x).tokens) @ w["proj"], expected)


def test_golden_token_learner():
    arrays = ref.read("tokenlearner")
    x, w = arrays["x"], ref.under(arrays, "w11.")
    dense = [
        {"kernel": w[f"{name}/kernel"], "bias": w[f"{name}/bias"]}
        for name in ("token_masking/Dense_0", "token_masking/Dense_1")
    ]
    weights = {
        "norm": {part: w[f"LayerNorm_0/{part}"] for part in ("scale", "bias")},
        "mlp": {"up": dense[0], "down": dense[1]},
    }
    expected = arrays["out11"]
    ref.close(ref.run(spec_of("token_learner", x, expected.shape[1]), weights, tokens=x).tokens, expected)


def test_golden_token_learner_conv():
    arrays = ref.read("tokenlearner")
    x, w = arrays["x"], ref.under(arrays, "w1.")
    kernels = {
        f"conv{i}": {"kernel": w[f"Conv_{i}/kernel"].reshape(9, *w[f"Conv_{i}/kernel"].shape[2:])} for i in range(4)
    }
    weights = {"norm": {part: w[f"LayerNorm_0/{part}"] for part in ("scale", "bias")}, **kernels}
    expected = arrays["out1_sum"]
    out = ref.run(spec_of("token_learner_conv", x, expected.shape[1]), weights, tokens=x).tokens
    ref.close(out, expected)
    ref.close(out / x.shape[1], arrays["out1_mean"])


def test_golden_llava_mini():
    arrays = ref.read("llava_mini")
    x, text, real = arrays["x"], arrays["text"], ~(arrays["padding"] > 0)
    heads, fusion_heads, w = 2, 3, ref.under(arrays, "wl.")
    depth = sum(name.endswith("q_proj.weight") for name in w)
    width, inner = text.shape[2], len(w["0.mlp.gate_proj.weight"])

    def compressor(w):
        return {
            "queries": w["query"],
            "query_norm": ref.norm(w, "ln_q"),
            "patch_norm": ref.norm(w, "ln_kv"),
            "attention": ref.attention(w, "attn", heads),
        }

    def layer(name):
        kernel = lambda part: w[f"{name}.{part}_proj.weight"].T  # noqa: E731
        own = {
            part: kernel(f"self_attn.{part[0]}").reshape(width, fusion_heads, -1) for part in ("query", "key", "value")
        }
        return own | {
            "out": kernel("self_attn.o").reshape(fusion_heads, -1, width),
            **{part: kernel(f"mlp.{part}") for part in ("gate", "up", "down")},
            "attention_norm": w[f"{name}.input_layernorm.weight"],
            "mlp_norm": w[f"{name}.post_attention_layernorm.weight"],
        }

    fusion = {f"fusion{i}": layer(str(i)) for i in range(depth)}
    sizes = {"heads": heads, "decoder": width, "mlp_width": inner, "fusion_heads": fusion_heads}
    question = {"question_tokens": text, "question_mask": real}
    for tokens, expected in ref.outputs(arrays, "compressed").items():
        weights, same = compressor(ref.under(arrays, f"w{tokens}.")), lambda y: y
        spec = spec_of("llava_mini", x, tokens, depth=0, **{**sizes, "decoder": x.shape[2]})
        blank = {"question_tokens": np.zeros((*text.shape[:2], x.shape[2]), np.float32), "question_mask": real}
        ref.close(ref.run(spec, weights, same, tokens=x, **blank).tokens, expected)
    tokens = arrays["image_out"].shape[1]
    weights = compressor(ref.under(arrays, f"w{tokens}.")) | fusion
    project = ref.projector(ref.under(arrays, "wp."), "0", "2")
    out = ref.run(spec_of("llava_mini", x, tokens, depth=depth, **sizes), weights, project, tokens=x, **question)
    ref.close(out.tokens, arrays["image_out"])
    ref.close(out.question, arrays["text_out"])
