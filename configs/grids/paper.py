"""The paper's grid (arXiv 2411.03312, section 3): Qwen1.5 of 0.5 to 14 billion parameters x seven numbers of visual
tokens. Arguments go to `configs/llava.py`:

    python -m experiments.launch --grid "configs/grids/paper.py:data=mix665k.json,images=DIR" ...
"""

from vlm_jax.config.sweep import Grid, param, product

SIZES = ("0.5b", "1.8b", "4b", "7b", "14b")
TOKENS = (1, 4, 16, 36, 64, 144, 576)


def get_grid(arg: str = "") -> Grid:
    pairs = (part.partition("=") for part in arg.split(",") if part.strip())
    shared = {name.strip(): value for name, _, value in pairs}
    cells = product(param("llm", *(f"qwen1.5-{size}" for size in reversed(SIZES))), param("tokens", *TOKENS))
    return Grid("configs/llava.py", tuple(cell | shared for cell in cells))
