"""Small cells of the study, for `experiments.training_speed.cells`: facts, all combinations of the lists.

    python -m experiments.launch --grid experiments/training_speed/grid.py:llms=d24+d48,tokens=1+4 --workdir DIR
"""

from vlm_jax.config.arguments import parse_arg, parse_list
from vlm_jax.config.sweep import Grid, param, product


def get_grid(arg: str = "") -> Grid:
    arg = parse_arg(arg, llms="d48", tokens="4", seeds="0", steps=400)
    tokens, seeds = (parse_list(name, getattr(arg, name)) for name in ("tokens", "seeds"))
    parts = param("llm", *arg.llms.split("+")), param("tokens", *tokens), param("seed", *seeds)
    return Grid("configs/vlm.py", product(*parts, param("family", "facts"), param("steps", arg.steps)))
