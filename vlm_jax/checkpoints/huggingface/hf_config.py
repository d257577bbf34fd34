"""`DecoderSpec` from the config.json of a Hugging Face decoder.

A field that changes the outputs is read or must have the value that our decoder implements. Files leave out fields at
the defaults of their configuration class; `FAMILIES` holds those defaults. `hf_rope` reads the rotary embedding.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlm_jax.checkpoints.huggingface import fields, hf_rope
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import DecoderSpec

Config = Mapping[str, Any]


class Family(NamedTuple):
    """One configuration class of transformers."""

    architecture: str
    defaults: dict[str, Any]
    spec: dict[str, Any]  # fields of `DecoderSpec` for every model of the family


def _sizes(
    vocab: int, width: int, mlp: int, depth: int, heads: int, keys: int | None, context: int, **more: Any
) -> dict[str, Any]:
    sizes = {
        "vocab_size": vocab, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": depth,
        "num_attention_heads": heads, "num_key_value_heads": keys, "max_position_embeddings": context,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "head_dim": None, "hidden_act": "silu",
    }  # fmt: skip
    return sizes | more


_TANH = "gelu_pytorch_tanh"
_GEMMA = {"head_dim": 256, "tie_word_embeddings": True}
_GEMMA2 = {"hidden_activation": _TANH, "query_pre_attn_scalar": 256, "sliding_window": 4096}
_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_PLUS_ONE = {"norm_plus_one": True, "scale_embedding": True}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", _sizes(32000, 4096, 11008, 32, 32, None, 2048), {}),
    "mistral": Family("MistralForCausalLM", _sizes(32000, 4096, 14336, 32, 32, 8, 131072, sliding_window=4096), {}),
    "qwen2": Family("Qwen2ForCausalLM", _sizes(151936, 4096, 22016, 32, 32, 32, 32768, **_QWEN), {"qkv_bias": True}),
    "qwen3": Family(
        "Qwen3ForCausalLM", _sizes(151936, 4096, 22016, 32, 32, 32, 32768, **_QWEN, head_dim=128), {"qk_norm": True}
    ),
    "gemma": Family(
        "GemmaForCausalLM", _sizes(256000, 3072, 24576, 28, 16, 16, 8192, **_GEMMA, hidden_act=_TANH), _PLUS_ONE
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _sizes(
            256000, 2304, 9216, 26, 8, 4, 8192, **_GEMMA, **_GEMMA2,
            attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        ),
        {**_PLUS_ONE, "sandwich_norm": True},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _sizes(262208, 2304, 9216, 26, 8, 4, 131072, **_GEMMA, **_GEMMA2, final_logit_softcapping=None),
        {**_PLUS_ONE, "sandwich_norm": True, "qk_norm": True},
    ),
}  # fmt: skip

READ = {
    "rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "layer_types", "sliding_window_pattern",
    "hidden_activation", "hidden_act",
}  # fmt: skip
# Fields that change the outputs, and the values that our decoder implements.
_TRUE = (
    "is_causal", "causal", "use_rope", "use_rotary", "rotary", "scale_attn_weights", "use_rms_norm", "gated_mlp",
    "do_layer_norm_before", "norm_before",
)  # fmt: skip
FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_bidirectional_attention": (False,),
    "partial_rotary_factor": (1,),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),  # in families that do not read it
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "position_embedding_type": ("rope", "rotary"),
    **dict.fromkeys(_TRUE, (True,)),
}
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu",
}  # fmt: skip


def decoder_spec(config: Config, where: str) -> DecoderSpec:
    """The spec of a config.json or its `text_config`. `where` names the file in errors. Raises `UserError` with the
    name of a field that our decoder does not implement.
    """
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise UserError(f"{where}: {unknown('model_type', kind, FAMILIES)}")
    family = FAMILIES[kind]
    _check_fields(config, kind, where)
    given = {**family.defaults, **config}

    def number(name: str) -> int:
        return fields.number(given, name, where)

    heads, width, depth = number("num_attention_heads"), number("hidden_size"), number("num_hidden_layers")
    kv_heads = heads if given["num_key_value_heads"] is None else number("num_key_value_heads")
    if heads % kv_heads or (given["head_dim"] is None and width % heads):
        raise UserError(
            f"{where}: hidden_size={width}, num_attention_heads={heads}, num_key_value_heads={kv_heads}: expected "
            "multiples of each other"
        )
    head_dim = width // heads if given["head_dim"] is None else number("head_dim")
    rope, attention_factor = hf_rope.read(given, kind, where)
    scale = number("query_pre_attn_scalar") ** -0.5 if "query_pre_attn_scalar" in family.defaults else None
    if attention_factor != 1:
        scale = (scale or head_dim**-0.5) * attention_factor**2
    name, mlp_width, vocab = Path(where).parent.name or kind, number("intermediate_size"), number("vocab_size")
    return DecoderSpec(
        name, width, depth, heads, kv_heads, head_dim, mlp_width, vocab,
        context=hf_rope.context(number("max_position_embeddings"), rope),
        norm_eps=fields.number(given, "rms_norm_eps", where, float),
        tied_head=fields.flag(given, "tie_word_embeddings", where),
        activation=_activation(given, kind, where),
        query_scale=scale,
        logit_softcap=_cap(given, "final_logit_softcapping", where),
        attention_softcap=_cap(given, "attn_logit_softcapping", where),
        **_windows(given, kind, depth, where),
        **rope,
        **family.spec,
    )  # fmt: skip


def _check_fields(config: Config, kind: str, where: str) -> None:
    family = FAMILIES[kind]
    own = {name: (family.spec.get(name, False),) for name in ("qkv_bias", "qk_norm")}
    fixed = {**FIXED, **own, "use_qk_norm": own["qk_norm"]}
    if "sliding_window" in family.defaults:
        fixed["use_sliding_window"] = (True, False)  # Mistral and Gemma ignore it
    fields.check(config, where, {*family.defaults, *READ}, fixed)


def _cap(config: Config, name: str, where: str) -> float | None:
    return None if config.get(name) is None else fields.number(config, name, where, float)


def _activation(config: Config, kind: str, where: str) -> str:
    field = "hidden_activation" if kind in ("gemma2", "gemma3_text") else "hidden_act"
    name = str(FAMILIES[kind].defaults[field] if config[field] is None else config[field])
    if kind == "gemma":
        # The first Gemma files have "gelu" but were trained with the tanh approximation.
        name = "gelu_pytorch_tanh" if name == "gelu" else name
        other = config.get("hidden_activation")
        if other not in (None, name):  # the newer field, which transformers 4 reads and 5 does not
            raise UserError(f"{where}: hidden_activation={other!r} is not supported with {field}={config[field]!r}")
    if name not in ACTIVATIONS:
        raise UserError(f"{where}: {unknown(field, name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _windows(config: Config, kind: str, depth: int, where: str) -> dict[str, Any]:
    """`window` and `window_pattern`."""
    defaults = FAMILIES[kind].defaults
    window = config.get("sliding_window") if "sliding_window" in defaults else None
    if window is None or ("use_sliding_window" in defaults and not fields.flag(config, "use_sliding_window", where)):
        return {}
    types = config.get("layer_types")
    if types is not None:
        names = {"full_attention": False, "sliding_attention": True}
        if not isinstance(types, list) or len(types) != depth or any(str(name) not in names for name in types):
            raise UserError(f"{where}: layer_types: expected {' or '.join(names)} for each of {depth} layers")
        local = [names[name] for name in types]
    elif kind.startswith("gemma"):
        given = {"sliding_window_pattern": 6, **config}
        period = 2 if kind == "gemma2" else fields.number(given, "sliding_window_pattern", where)
        local = [(i + 1) % period != 0 for i in range(depth)]
    else:
        first = config.get("max_window_layers", 0)
        if not isinstance(first, int):
            raise UserError(f"{where}: max_window_layers={first!r}: expected an integer")
        local = [i >= first for i in range(depth)]
    if kind == "mistral" and not all(local):
        raise UserError(f"{where}: layer_types: expected one type for all layers of {FAMILIES[kind].architecture}")
    if not any(local):
        return {}
    for pattern in (0, *range(2, depth + 1)):
        if local == [not pattern or (i + 1) % pattern != 0 for i in range(depth)]:
            return {"window": fields.number(config, "sliding_window", where), "window_pattern": pattern}
    field = "layer_types" if types is not None else "max_window_layers"
    raise UserError(f"{where}: {field}: expected full attention in every n-th layer and sliding windows elsewhere")
