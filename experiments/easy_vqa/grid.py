"""Three decoders x four numbers of visual tokens, at equal steps."""

from vlm_jax.config.sweep import Grid, param, product


def get_grid(arg: str = "") -> Grid:
    steps = int(arg or 1200)
    # Large cells first, so that no worker ends on a long one.
    cells = product(param("llm", "d96", "d48", "d24"), param("tokens", 16, 4, 1, 0), param("steps", steps))
    return Grid("experiments/easy_vqa/config.py", cells)
