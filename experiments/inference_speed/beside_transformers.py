"""How fast a loaded language model reads a prompt and says the next tokens, beside transformers on the same weights.

    python -m experiments.inference_speed.beside_transformers --threads 1        # needs torch and transformers

Random float32 weights of public shapes are written once as a folder, and both sides load it. Whether both say the same
greedy tokens is checked. Writes beside_transformers.json and its table in README.md.
"""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.inference_speed import measuring
from vlm_jax.cli import run_main
from vlm_jax.core.specs import DecoderSpec
from vlm_jax.sizing import zoo


def versions() -> dict[str, str]:
    import jax
    import torch
    import transformers

    return {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def both(name: str, folder: Path, threads: int) -> measuring.Sides:
    """Loads the same random weights into transformers and vlm_jax."""
    import torch
    import transformers

    import vlm_jax

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(hugging_face_config(zoo.decoder(name)), dtype=torch.float32)
    made.get_input_embeddings().weight.data.mul_(0.1)  # which may be the head too
    made.save_pretrained(folder)
    del made
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = vlm_jax.load(folder)

    def sides(batch: int, prompt_tokens: int) -> tuple[measuring.Generate, measuring.Generate]:
        tokens = np.random.default_rng(batch).integers(10, 40_000, (batch, prompt_tokens))
        ids = torch.from_numpy(tokens)

        def reference_tokens(new_tokens: int) -> np.ndarray:
            with torch.inference_mode():
                out = reference.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
                )
            return out[:, ids.shape[1] :].numpy()

        return reference_tokens, lambda new_tokens: vlm_jax.generate_tokens(model, None, tokens, new_tokens)

    return sides


def hugging_face_config(spec: DecoderSpec) -> Any:
    """The transformers config of a decoder, without eos. Weights have a larger scale than usual and the
    embedding a smaller one, so that answers do not repeat one token, on which both sides would agree trivially.
    """
    import transformers

    kind = transformers.Qwen2Config if spec.qkv_bias else transformers.LlamaConfig
    return kind(
        hidden_size=spec.width, intermediate_size=spec.mlp_width, num_hidden_layers=spec.depth,
        num_attention_heads=spec.heads, num_key_value_heads=spec.kv_heads, vocab_size=spec.vocab,
        tie_word_embeddings=spec.tied_head, rms_norm_eps=spec.norm_eps, max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta}, eos_token_id=None, bos_token_id=None,
        initializer_range=0.06,
    )  # fmt: skip


PEER = measuring.Peer(
    name="transformers",
    models=("smollm2-135m", "qwen2.5-0.5b"),
    visual_tokens=0,
    prompt_tokens=256,
    imports=("torch", "transformers"),
    versions=versions,
    open=both,
)


def main(argv: list[str]) -> None:
    measuring.main(argv, PEER, __doc__)


if __name__ == "__main__":
    run_main(main)
