"""Prefill and decode steps beside transformers, with the same bfloat16 weights on the same GPU.

Paired and in turn as in `experiments.inference_speed.measuring`; transformers runs its default attention (sdpa).
"""

import functools
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import vlm_jax
from experiments.gpu.cases import Case
from experiments.gpu.results import Results
from experiments.gpu.sizes import Sizes
from experiments.inference_speed import measuring
from experiments.inference_speed.beside_transformers import hugging_face_config, versions
from vlm_jax.core.specs import DecoderSpec
from vlm_jax.sizing.chips import Chip

PART = "transformers"
_WALL_CLOCK = 0  # of `measuring.measure`: its CPU clock is for one thread


def cases(sizes: Sizes, results: Results, chip: Chip) -> list[Case]:
    """A case for each LLM, number of visual tokens in the prompt, and batch; or one that says why there are none."""
    if reason := unavailable():
        return [Case("transformers", lambda: None, lambda _: {"note": reason})]
    open_pair = functools.cache(pair)
    return [
        Case(
            case_name(decoder, tokens + sizes.question_tokens, batch),
            lambda: None,
            lambda _, d=decoder, n=tokens + sizes.question_tokens, b=batch: measured(open_pair(d), d, n, b, sizes),
        )
        for decoder in sizes.decoders
        for tokens in sizes.tokens
        for batch in sizes.batches
    ]


def case_name(decoder: DecoderSpec, prompt_tokens: int, batch: int) -> str:
    return f"{decoder.name}, prompt of {prompt_tokens} tokens, batch {batch}"


def unavailable() -> str:
    """Why there is nothing to compare with; "" where there is."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    import torch

    on_gpu = jax.default_backend() != "cpu"
    return "torch has no CUDA" if on_gpu and not torch.cuda.is_available() else ""


def pair(decoder: DecoderSpec) -> tuple[Any, Any]:
    """The same random weights in transformers and in vlm_jax."""
    import torch
    import transformers

    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, torch.device(device):
        made = transformers.AutoModelForCausalLM.from_config(hugging_face_config(decoder), dtype=torch.bfloat16)
        made.get_input_embeddings().weight.data.mul_(0.1)  # which may be the head too
        made.save_pretrained(folder)
        return made.eval(), vlm_jax.load(Path(folder), dtype="bfloat16")


def measured(
    sides: tuple[Any, Any], decoder: DecoderSpec, prompt_tokens: int, batch: int, sizes: Sizes
) -> dict[str, Any]:
    """Median milliseconds of both, and ratios transformers / vlm_jax of paired calls."""
    import torch

    reference, model = sides
    tokens = np.random.default_rng(batch).integers(10, decoder.vocab, (batch, prompt_tokens))
    ids = torch.from_numpy(tokens).to(reference.device)

    def reference_tokens(new_tokens: int) -> np.ndarray:
        with torch.inference_mode():
            out = reference.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
            )
        return out[:, ids.shape[1] :].cpu().numpy()

    ours: Callable[[int], np.ndarray] = lambda new: vlm_jax.generate_tokens(model, None, tokens, new)  # noqa: E731
    found = measuring.measure(reference_tokens, ours, sizes.answer_tokens, sizes.repeats, _WALL_CLOCK)
    settings = {"llm": decoder.name, "prompt_tokens": prompt_tokens, "batch": batch, "new_tokens": sizes.answer_tokens}
    return {**settings, "versions": versions(), **found}
