"""How fast loaded models read prompts and answer, beside transformers."""
