"""`make demo`: three decoders x three token counts and the blind baseline, two families, one seed."""

from vlm_jax.config.sweep import Grid, param, product


def get_grid(arg: str = "") -> Grid:
    del arg
    # Large cells first, so that no worker ends on a long one.
    return Grid(
        "configs/vlm.py",
        product(
            param("family", "ocr", "facts"),
            param("llm", "d96", "d48", "d24"),
            param("tokens", 8, 2, 1, 0),
            param("recipe", "demo"),
        ),
    )
