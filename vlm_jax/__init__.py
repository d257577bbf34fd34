"""Inference-optimal vision-language models in JAX: train a grid, fit a law, plan from it.

The public API, imported lazily so that planning needs neither JAX nor a device:

    vlm_jax.load(path, dtype=..., plan=None)      a Hugging Face folder, a big_vision .npz or a run's workdir -> Model
    vlm_jax.forward(model, images, tokens)        uint8[B,h,w,3] or None, int[B,T] -> float32[B,T,W]
    vlm_jax.generate(model, images, prompts)      -> texts                            (`inference.api`)
    vlm_jax.fit(rows)                             rows.jsonl's rows -> LawFit         (`scaling.fit`)
    vlm_jax.best(law, budget, question_tokens)    -> ranked choices                   (`scaling.frontier`)
    vlm_jax.score(benchmark, prediction, references, flavour)     the official metric of one item (`evaluation.metrics`)
    vlm_jax.RunSpec, ModelSpec, ...               the specs of a run                  (`core.specs`)
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    **dict.fromkeys(("load", "Model"), "vlm_jax.inference.loading"),
    **dict.fromkeys(("forward", "generate", "generate_tokens"), "vlm_jax.inference.api"),
    "fit": "vlm_jax.scaling.fit",
    "best": "vlm_jax.scaling.frontier",
    "score": "vlm_jax.evaluation.metrics",
    **dict.fromkeys(("RunSpec", "ModelSpec", "EncoderSpec", "CompressorSpec", "DecoderSpec"), "vlm_jax.core.specs"),
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'vlm_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
