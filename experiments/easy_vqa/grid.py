"""Three decoders x four numbers of visual tokens, at equal steps (`grid.py:3000` has more of them)."""

from vlm_jax.config.sweep import Grid, param, product


def get_grid(arg: str = "") -> Grid:
    steps = int(arg or 1000)
    cells = product(param("llm", "d48", "d24", "d96"), param("tokens", 4, 16, 1, 0), param("steps", steps))
    return Grid("experiments/easy_vqa/config.py", cells)
