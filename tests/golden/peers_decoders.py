"""Makes hf_decoders.npz with transformers: what it computes for a small random decoder of every architecture we read.

    python -m tests.golden.peers_decoders          # with torch and transformers; see make_peers.py

For each model the file holds its config.json, the names and shapes of its tensors, and transformers' logits and greedy
text. The weights are drawn from their names.
"""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.golden.drawn import redrawn

PATH = Path(__file__).with_name("hf_decoders.npz")
NEW_TOKENS = 64
_SMALL = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 61,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
_BANDS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_YARN = {"rope_type": "yarn", "original_max_position_embeddings": 32}  # of 83 that are read
_YARN_ODD = {"beta_fast": 5.0, "beta_slow": 0.7, "truncate": False, "mscale": 0.7, "mscale_all_dim": 1.3}
_ODD = {"head_dim": 10}  # apart from the width, and no power of two
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {**_ODD, "rope_theta": 1e3, "rope_scaling": {"rope_type": "llama3", **_BANDS}}),
    "vicuna_long": ("Llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "smollm2": ("Llama", {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral_window": ("Mistral", {**_ODD, "sliding_window": 7, "rope_theta": 1e4}),
    "mistral": ("Mistral", {"sliding_window": None, "rope_theta": 1e6}),
    "qwen2": ("Qwen2", {"rope_theta": 1e6, "sliding_window": 16, "max_window_layers": 2}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    "qwen2_yarn": ("Qwen2", {"head_dim": 16, "rope_theta": 1e2, "rope_scaling": {**_YARN, "factor": 4.0}}),
    "qwen3_yarn": ("Qwen3", {"head_dim": 16, "rope_theta": 1e3, "rope_scaling": {**_YARN, **_YARN_ODD, "factor": 3}}),
    "qwen3": ("Qwen3", {**_ODD, "rope_theta": 1e6, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 12}),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 8, "num_hidden_layers": 7, "sliding_window": 6, "query_pre_attn_scalar": 10,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}  # fmt: skip


class Case(NamedTuple):
    """One model and what the peer says of it."""

    config: dict[str, Any]
    shapes: dict[str, list[int]]
    logits: np.ndarray  # [B, T, W], zero where there is padding
    greedy: np.ndarray  # [B, NEW_TOKENS] behind the left-padded prompts


def prompts() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and 1 for those that are real: rows of different lengths, one padded left, one right, one not at all."""
    tokens = np.random.default_rng(3).integers(2, 61, (3, 19))
    real = np.ones_like(tokens)
    real[0, :6] = 0
    real[1, 13:] = 0
    return np.where(real, tokens, 0), real


def left_padded() -> tuple[np.ndarray, np.ndarray]:
    """The same rows as a generator wants them."""
    tokens, real = prompts()
    order = np.argsort(real, axis=1, kind="stable")
    return np.take_along_axis(tokens, order, 1), np.take_along_axis(real, order, 1)


def build(name: str) -> Case:
    """What transformers makes of a model with weights drawn from their names, in float32 on the CPU."""
    import transformers

    family, fields = MODELS[name]
    config_class = getattr(transformers, family + ("TextConfig" if family == "Gemma3" else "Config"))
    # A copy: transformers writes into the groups that it is given.
    config = config_class(**json.loads(json.dumps(_SMALL | fields)))
    with tempfile.TemporaryDirectory() as folder:
        # Gemma 2's caps are left out by the fused attention.
        how = {"attn_implementation": "eager"}
        model, shapes = redrawn(getattr(transformers, family + "ForCausalLM")(config), Path(folder), **how)
    said = json.loads(model.config.to_json_string(use_diff=False)) | {"_name_or_path": ""}
    return Case(said, shapes, *ask(model))


def ask(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """The `logits` and `greedy` of a model of transformers."""
    import torch

    tokens, real = (torch.from_numpy(array) for array in prompts())
    with torch.no_grad():
        position = (real.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=tokens, attention_mask=real, position_ids=position).logits * real[..., None]
        tokens, real = (torch.from_numpy(array) for array in left_padded())
        greedy = model.generate(
            input_ids=tokens, attention_mask=real, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None,
            use_cache=True, pad_token_id=0,
        )[:, tokens.shape[1] :]  # fmt: skip
    return logits.numpy(), greedy.numpy()


def read() -> dict[str, Case]:
    """The golden file."""
    with np.load(PATH, allow_pickle=False) as archive:
        said = json.loads(str(archive["said"]))
        return {name: Case(*said[name], archive[f"{name}/logits"], archive[f"{name}/greedy"]) for name in said}


def main() -> None:
    cases = {name: build(name) for name in MODELS}
    arrays = {f"{name}/{field}": getattr(case, field) for name, case in cases.items() for field in ("logits", "greedy")}
    arrays["said"] = np.array(json.dumps({name: (case.config, case.shapes) for name, case in cases.items()}))
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH} {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
