"""Public models, and this project's runs, from the files that users hold: load one, look inside, let it answer."""

from vlm_jax.inference.api import forward, generate, generate_tokens
from vlm_jax.pretrained.loading import Model, load

__all__ = ["Model", "forward", "generate", "generate_tokens", "load"]
