"""config.json of a Hugging Face decoder <-> `DecoderSpec`.

A field that changes the mathematics is read, or must have the one value that our decoder has; nothing of that kind is
passed over. Files leave out what equals the default of their configuration class, so those defaults stand here.
`rope_theta` and `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5) are both understood.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import DecoderSpec, RopeBands
from vlm_jax.models.importers import fields

Config = Mapping[str, Any]


class Family(NamedTuple):
    """One configuration class of transformers."""

    architecture: str
    defaults: dict[str, Any]
    spec: dict[str, Any]  # what sets the family apart, whatever the sizes


def _sizes(
    vocab: int, width: int, mlp: int, depth: int, heads: int, keys: int | None, context: int, **more: Any
) -> dict[str, Any]:
    sizes = {
        "vocab_size": vocab, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": depth,
        "num_attention_heads": heads, "num_key_value_heads": keys, "max_position_embeddings": context,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "head_dim": None, "hidden_act": "silu",
    }  # fmt: skip
    return sizes | more


_GEMMA = {"head_dim": 256, "tie_word_embeddings": True}
_GEMMA2 = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096}
_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_PLUS_ONE = {"norm_plus_one": True, "scale_embedding": True}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", _sizes(32000, 4096, 11008, 32, 32, None, 2048), {}),
    "mistral": Family("MistralForCausalLM", _sizes(32000, 4096, 14336, 32, 32, 8, 131072, sliding_window=4096), {}),
    "qwen2": Family("Qwen2ForCausalLM", _sizes(151936, 4096, 22016, 32, 32, 32, 32768, **_QWEN), {"qkv_bias": True}),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _sizes(151936, 4096, 22016, 32, 32, 32, 32768, **_QWEN, head_dim=128),
        {"qk_norm": True},
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        _sizes(256000, 3072, 24576, 28, 16, 16, 8192, **_GEMMA, hidden_act="gelu_pytorch_tanh"),
        _PLUS_ONE,
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
# Fields that change the mathematics, and the values that mean what our decoder does.
FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_bidirectional_attention": (False,),
    "partial_rotary_factor": (1,),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),  # of families that do not read it
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "position_embedding_type": ("rope", "rotary"),
    **dict.fromkeys(
        (
            "is_causal", "causal", "use_rope", "use_rotary", "rotary", "scale_attn_weights", "use_rms_norm",
            "gated_mlp", "do_layer_norm_before", "norm_before",
        ),
        (True,),
    ),
}  # fmt: skip
_MOST = 1e30  # a number beyond is a slip
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu",
}  # fmt: skip
_ROPE_FIELDS = {
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # fmt: skip


def decoder_spec(config: Config, where: str) -> DecoderSpec:
    """The spec of a text model's config (config.json, or `text_config` in one). `where` names the file in errors.

    Raises `UserError` for a field that our decoder cannot express, by its name.
    """
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise UserError(f"{where}: {unknown('model_type', kind, FAMILIES)}")
    family = FAMILIES[kind]
    _check_fields(config, kind, where)
    given = {**family.defaults, **config}
    heads = _number(given, "num_attention_heads", where)
    width = _number(given, "hidden_size", where)
    keys = heads if given["num_key_value_heads"] is None else _number(given, "num_key_value_heads", where)
    if heads % keys or (given["head_dim"] is None and width % heads):
        raise UserError(
            f"{where}: hidden_size={width}, num_attention_heads={heads} and num_key_value_heads={keys} do not divide"
        )
    sandwich = "query_pre_attn_scalar" in family.defaults
    depth = _number(given, "num_hidden_layers", where)
    return DecoderSpec(
        name=Path(where).parent.name or kind,
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=keys,
        head_dim=width // heads if given["head_dim"] is None else _number(given, "head_dim", where),
        mlp_width=_number(given, "intermediate_size", where),
        vocab=_number(given, "vocab_size", where),
        context=_number(given, "max_position_embeddings", where),
        norm_eps=_number(given, "rms_norm_eps", where, float),
        tied_head=_flag(given, "tie_word_embeddings", where),
        activation=_activation(given, kind, where),
        query_scale=_number(given, "query_pre_attn_scalar", where) ** -0.5 if sandwich else None,
        logit_softcap=_cap(given, "final_logit_softcapping", where),
        attention_softcap=_cap(given, "attn_logit_softcapping", where),
        **_windows(given, kind, depth, where),
        **_rope(given, kind, where),
        **family.spec,
    )


def _check_fields(config: Config, kind: str, where: str) -> None:
    """Raises `UserError` for a field that changes the mathematics and is not read."""
    family = FAMILIES[kind]
    own = {name: (family.spec.get(name, False),) for name in ("qkv_bias", "qk_norm")}
    fixed = {**FIXED, **own, "use_qk_norm": own["qk_norm"]}
    fields.check(config, where, {*family.defaults, *READ}, fixed)


def _number(config: Config, name: str, where: str, kind: type = int) -> Any:
    value = config[name]
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _MOST
    if not fits or (kind is int and value != int(value)):
        raise UserError(f"{where}: {name}={value!r}: a positive {'number' if kind is float else 'integer'} is wanted")
    return kind(value)


def _flag(config: Config, name: str, where: str) -> bool:
    if not isinstance(config[name], bool):
        raise UserError(f"{where}: {name}={config[name]!r}: true or false is wanted")
    return config[name]


def _cap(config: Config, name: str, where: str) -> float | None:
    return None if config.get(name) is None else _number(config, name, where, float)


def _activation(config: Config, kind: str, where: str) -> str:
    field = "hidden_activation" if kind in ("gemma2", "gemma3_text") else "hidden_act"
    name = str(FAMILIES[kind].defaults[field] if config[field] is None else config[field])
    if kind == "gemma":
        # The first Gemma files say "gelu" and were trained with its tanh form; `hidden_activation` came later.
        name = config.get("hidden_activation") or ("gelu_pytorch_tanh" if name == "gelu" else name)
    if name not in ACTIVATIONS:
        raise UserError(f"{where}: {unknown(field, name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _windows(config: Config, kind: str, depth: int, where: str) -> dict[str, Any]:
    """`window` and `window_pattern`."""
    window = config.get("sliding_window") if "sliding_window" in FAMILIES[kind].defaults else None
    if window is None or ("use_sliding_window" in config and not _flag(config, "use_sliding_window", where)):
        return {}
    types = config.get("layer_types")
    if types is not None:
        names = {"full_attention": False, "sliding_attention": True}
        if not isinstance(types, list) or len(types) != depth or any(str(name) not in names for name in types):
            raise UserError(f"{where}: layer_types: {' or '.join(names)} is wanted for each of {depth} layers")
        local = [names[name] for name in types]
    elif kind.startswith("gemma"):
        given = {"sliding_window_pattern": 6, **config}
        period = 2 if kind == "gemma2" else _number(given, "sliding_window_pattern", where)
        local = [(i + 1) % period != 0 for i in range(depth)]
    else:
        first = config.get("max_window_layers", 0)
        if not isinstance(first, int):
            raise UserError(f"{where}: max_window_layers={first!r}: an integer is wanted")
        local = [i >= first for i in range(depth)]
    if kind == "mistral" and not all(local):
        raise UserError(f"{where}: layer_types: layers of two kinds are not part of {FAMILIES[kind].architecture}")
    if not any(local):
        return {}
    for pattern in (0, *range(2, depth + 1)):
        if local == [not pattern or (i + 1) % pattern != 0 for i in range(depth)]:
            return {"window": _number(config, "sliding_window", where), "window_pattern": pattern}
    field = "layer_types" if types is not None else "max_window_layers"
    raise UserError(f"{where}: {field}: only a pattern in which every n-th layer sees everything is supported")


def _rope(config: Config, kind: str, where: str) -> dict[str, Any]:
    """`rope_theta`, `rope_factor`, `rope_bands` and `local_rope_theta`, from either style of file."""
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    for name, group in (("rope_parameters", new), ("rope_scaling", old)):
        if group is not None and not isinstance(group, dict):
            raise UserError(f"{where}: {name}={group!r}: an object is wanted")
    if kind == "gemma3_text":
        nested = new or {}
        if stray := set(nested) - {"full_attention", "sliding_attention"}:
            raise UserError(
                f"{where}: rope_parameters: {min(stray)} stands beside the kinds of layers; it belongs in one"
            )
        whole = {"rope_theta": config.get("rope_theta", 1e6), **(nested.get("full_attention") or {}), **(old or {})}
        near = {"rope_theta": config.get("rope_local_base_freq", 1e4), **(nested.get("sliding_attention") or {})}
        local = _one_rope(near, config, f"{where}: rope_parameters.sliding_attention")
        if local["rope_factor"] != 1:
            raise UserError(f"{where}: rope_parameters.sliding_attention: only the plain kind is supported")
        found = _one_rope(whole, config, f"{where}: rope_{'scaling' if old else 'parameters'}")
        return {**found, "local_rope_theta": local["rope_theta"]}
    group = old or new or {}
    if "full_attention" in group or "sliding_attention" in group:
        groups = [one for one in group.values() if one is not None]
        if any(one != groups[0] for one in groups):
            raise UserError(f"{where}: rope_parameters: kinds of layers that differ are not supported for {kind}")
        group = groups[0]
    group = {"rope_theta": config.get("rope_theta", 1e4), **group}
    return _one_rope(group, config, f"{where}: rope_{'scaling' if old else 'parameters'}")


def _one_rope(group: Config, config: Config, where: str) -> dict[str, Any]:
    kind = str(group.get("rope_type", group.get("type", "default")))
    if kind not in _ROPE_FIELDS:
        raise UserError(f"{where}: rope_type={kind!r} is not supported: {', '.join(_ROPE_FIELDS)} are")
    allowed = ("rope_type", "type", "rope_theta", *_ROPE_FIELDS[kind])
    for name, value in group.items():
        if name not in allowed and value is not None and not (name == "partial_rotary_factor" and value == 1):
            raise UserError(f"{where}: {name}={value!r} is not supported for rope_type={kind}")
    filled = {"original_max_position_embeddings": config["max_position_embeddings"], **group}
    values = {}
    for name in ("rope_theta", *_ROPE_FIELDS[kind]):
        if name not in filled:
            raise UserError(f"{where}: {name} is missing")
        values[name] = _number(filled, name, where, float)
    bands = None
    if kind == "llama3":
        if values["high_freq_factor"] <= values["low_freq_factor"]:
            raise UserError(f"{where}: high_freq_factor must be larger than low_freq_factor")
        context = int(values["original_max_position_embeddings"])
        bands = RopeBands(values["low_freq_factor"], values["high_freq_factor"], context)
    return {"rope_theta": values["rope_theta"], "rope_factor": values.get("factor", 1.0), "rope_bands": bands}
