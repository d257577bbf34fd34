"""Rows of a config that a compressor's tokens cannot be part of are one line that names the field."""

import pytest

from vlm_jax.config.arguments import load_config
from vlm_jax.config.resolve import resolve
from vlm_jax.core.errors import UserError

SEPARATE = {"data.format": "v1", "data.train.0.separate": "True"}


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        ("vlm.py:compressor=voco,tokens=4", {"data.pack": "fit"}, r"data\.pack: expected none for compressor voco"),
        ("llava.py:compressor=voco,tokens=4,pack=fit", {}, r"data\.pack: expected none for compressor voco"),
        (
            "vlm.py:compressor=voco,tokens=4",
            SEPARATE | {"data.questions_per_example": "3"},
            r"data\.questions_per_example: expected 1 for compressor voco and data\.format=v1, got 3",
        ),
        (
            "llava.py:compressor=fastv,tokens=36",
            {"data.row_images": "9"},
            r"data\.row_tokens: expected at least 4861 for compressor fastv and 9 images a row, got 2048",
        ),
        ("vlm.py", {"model.compressor.depth": "1", "compute.attention": "x"}, r"compute\.attention"),
    ],
)
def test_rows_without_room_are_refused(config: str, fields: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(load_config(f"configs/{config}", fields))


@pytest.mark.parametrize("compressor", ["fastv", "pyramiddrop", "victor", "voco", "llava_mini", "vision_zip"])
def test_the_recipes_have_room_for_every_kind_of_compressor(compressor: str) -> None:
    """In the study's rows, and in packed rows; where patches are hidden, a row is one conversation."""
    spec = resolve(load_config(f"configs/vlm.py:compressor={compressor},tokens=4"))
    assert spec.data.frozen_features
    packed = resolve(load_config(f"configs/llava.py:compressor={compressor},tokens=36"))
    assert packed.data.pack == ("none" if compressor == "voco" else "fit")
