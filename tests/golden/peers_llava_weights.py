"""Makes the golden file of checkpoints in LLaVA's own layout, with the connectors of LLaVA, TokenPacker and QueCC.

    LLAVA=... TOKENPACKER=... QUECC=... python -m tests.golden.peers_llava_weights    # git folders; see make_peers.py

CLIP and Llama are those of transformers, small; connectors are built by the official code, whose fixed widths (1024 and
4096) are replaced. What joins them is written here. The weights are drawn from their names.
"""

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.drawn import weights
from tests.golden.peers_conversations import source

HERE = Path(__file__).parent
GOLDEN = HERE / "peers_llava_weights.npz"
TAPS = (12, 16, 22, 23)
CLIP = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 24, "num_attention_heads": 2, "image_size": 24,
    "patch_size": 4, "projection_dim": 8,
}  # fmt: skip
TEXT = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# What the config.json of a release holds.
LLAMA = {
    **TEXT, "_name_or_path": "vicuna-7b-v1.5", "hidden_act": "silu", "initializer_range": 0.02, "max_length": 64,
    "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.31.0", "use_cache": True,
}  # fmt: skip
FIELDS = {
    "freeze_mm_mlp_adapter": False, "image_aspect_ratio": "pad", "image_grid_pinpoints": None, "mm_hidden_size": 16,
    "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2, "mm_vision_tower": "openai/clip-vit-large-patch14-336", "tune_mm_mlp_adapter": False,
    "use_mm_proj": True, "tokenizer_padding_side": "right", "tokenizer_model_max_length": 2048,
}  # fmt: skip
LATER = {
    "model_type": "llava_llama", "mm_patch_merge_type": "flat", "mm_projector_lr": None, "mm_resampler_type": None,
    "unfreeze_mm_vision_tower": False,
}  # fmt: skip
QUECC = {
    "mm_vision_token_compression_type": "quecc", "mm_vision_output_token_count": 36,
    "mm_vision_output_text_embedding_size": 24, "mm_vision_output_combined_token_count": None,
}  # fmt: skip


def quecc_fields(side: int) -> dict[str, Any]:
    sizes = ("mm_vision_token_compression_kernel_size", "mm_vision_token_compression_stride")
    return {**LATER, **QUECC, **dict.fromkeys(sizes, side)}


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {  # (repository, V, fields)
    "llava15": ("LLAVA", 36, {**LATER, "mm_projector_type": "mlp2x_gelu"}),
    "llava1": ("LLAVA", 36, {"model_type": "llava", "mm_projector_type": "linear", "image_aspect_ratio": "square"}),
    "llava_last": ("LLAVA", 36, {**LATER, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -1}),
    "tokenpacker": (
        "TOKENPACKER", 9, {"model_type": "llava", "mm_projector_type": "tokenpacker", "scale_factor": 2}
    ),
    "tokenpacker_4": (
        "TOKENPACKER", 4, {"model_type": "llava", "mm_projector_type": "tokenpacker", "scale_factor": 3}
    ),
    "quecc": ("QUECC", 4, {**quecc_fields(3), "mm_projector_type": "mlp2x_gelu"}),
    "quecc_linear": ("QUECC", 1, {**quecc_fields(6), "mm_projector_type": "linear"}),
}  # fmt: skip
QUESTION = [1, 7, 23, 11, 30]  # its ids, with the begin token


def pixels() -> np.ndarray:
    """float32[2, H, H, 3], already normalised."""
    return np.random.default_rng(24).standard_normal((2, 24, 24, 3)).astype(np.float32)


def prompt(tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [2, 12] and the same with so many placeholders (the id behind the vocabulary) behind the third."""
    ids = np.random.default_rng(7).integers(3, 40, (2, 12))
    image = np.full((2, tokens), TEXT["vocab_size"])
    return ids, np.concatenate([ids[:, :3], image, ids[:, 3:]], axis=1)


def official(repository: str) -> types.ModuleType:
    """`multimodal_projector.builder` of a repository."""
    folder = "llava/model/multimodal_projector"
    package = types.ModuleType(f"peer_{repository.lower()}")
    package.__path__ = []
    sys.modules[package.__name__] = package
    for name in ("quecc", "builder") if repository == "QUECC" else ("builder",):
        module = types.ModuleType(f"{package.__name__}.{name}")
        module.__package__ = package.__name__
        sys.modules[module.__name__] = module
        exec(source(repository, f"{folder}/{name}.py"), module.__dict__)
    return module


def connector(repository: str, config: Any, clip: Any, torch: Any) -> Any:
    """The official module at the widths of CLIP and TEXT."""
    builder, narrow = official(repository), len(TAPS) * CLIP["hidden_size"]

    def layers(first: int, width: int) -> Any:
        linear = torch.nn.Linear
        return torch.nn.Sequential(linear(first, width), torch.nn.GELU(), linear(width, width))

    if repository == "TOKENPACKER":
        width = CLIP["hidden_size"]
        module = builder.TokenPacker(
            raw_grid=6, embed_dim=width, kv_dim=width, hidden_size=config.hidden_size, scale_factor=config.scale_factor
        )
        module.k_proj_1, module.v_proj_1 = layers(narrow, width), layers(narrow, width)
        module.mlp = layers(width, config.hidden_size)
        return module
    if repository == "QUECC":
        module = builder.build_vision_projector(config, clip.config)
        for part in (module[0].k_proj, module[0].v_proj):
            part[0] = torch.nn.Linear(narrow, CLIP["hidden_size"])
        return module
    return builder.build_vision_projector(config)


def load(module: Any, prefix: str, torch: Any) -> dict[str, list[int]]:
    """Draws a module's weights; returns their shapes under their names in the checkpoint."""
    shapes = {prefix + name: list(leaf.shape) for name, leaf in sorted(module.state_dict().items())}
    drawn = {name.removeprefix(prefix): torch.from_numpy(leaf) for name, leaf in weights(shapes).items()}
    module.load_state_dict(drawn)
    module.eval()
    return shapes


def run(repository: str, tokens: int, config: Any, clip: Any, llama: Any, module: Any, torch: Any) -> dict[str, Any]:
    """Features, logits and greedy ids."""
    image = torch.from_numpy(pixels()).permute(0, 3, 1, 2)
    states = clip(pixel_values=image, output_hidden_states=True).hidden_states
    patches = states[config.mm_vision_select_layer][:, 1:]
    several = torch.cat([states[layer] for layer in TAPS], dim=2)[:, 1:]
    if repository == "TOKENPACKER":
        features = module((patches, several))
    elif repository == "QUECC":
        question = torch.tensor([QUESTION, QUESTION])
        last = llama(input_ids=question, output_hidden_states=True).hidden_states[-1][:, -1:]
        features = module((several, last, patches))
    else:
        features = module(patches)
    assert features.shape[1] == tokens
    ids = torch.from_numpy(prompt(tokens)[0])
    out: list[Any] = []
    for _ in range(7):
        embedded = llama.model.embed_tokens(torch.cat([ids, *out], dim=1))
        joined = torch.cat([embedded[:, :3], features, embedded[:, 3:]], dim=1)
        logits = llama(inputs_embeds=joined).logits
        first = logits if not out else first
        out.append(logits[:, -1:].argmax(-1))
    return {"features": features, "logits": first, "generated": torch.cat(out, dim=1)[:, :6]}


def golden() -> dict[str, np.ndarray]:
    import torch
    import transformers as t

    torch.set_num_threads(1)
    clip = t.CLIPVisionModel(t.CLIPVisionConfig(**CLIP))
    llama = t.LlamaForCausalLM(t.LlamaConfig(**TEXT, rms_norm_eps=1e-5, attn_implementation="eager"))
    tower = {"config": {}, "shapes": load(clip, "", torch)}
    language = load(llama, "", torch)
    tower["config"] = {"architectures": ["CLIPVisionModel"], **clip.config.to_diff_dict()}
    tower["config"].pop("transformers_version", None)
    out = {}
    for name, (repository, tokens, fields) in CASES.items():
        config = {**LLAMA, **FIELDS, **fields, "architectures": ["LlavaLlamaForCausalLM"]}
        module = connector(repository, types.SimpleNamespace(**config), clip, torch)
        shapes = {**language, **load(module, "model.mm_projector.", torch)}
        files = {"config": config, "shapes": shapes, "tower": tower}
        out[f"{name}/files"] = np.array(json.dumps(files))
        with torch.no_grad():
            found = run(repository, tokens, types.SimpleNamespace(**config), clip, llama, module, torch)
        out |= {f"{name}/{key}": value.numpy() for key, value in found.items()}
    return out


if __name__ == "__main__":
    content = io.BytesIO()
    np.savez_compressed(content, **golden())
    GOLDEN.write_bytes(content.getvalue())
