"""Three decoders x four numbers of visual tokens, at equal steps (`grid.py:1200` has more of them)."""

from vlm_jax.config.sweep import Grid, param, product


def get_grid(arg: str = "") -> Grid:
    steps = int(arg or 800)
    # Large cells first, so that no worker ends on a long one.
    cells = product(param("llm", "d96", "d48", "d24"), param("tokens", 16, 4, 1, 0), param("steps", steps))
    return Grid("experiments/easy_vqa/config.py", cells)
