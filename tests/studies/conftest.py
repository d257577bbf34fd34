"""The tiny data sets, built once a session."""

import pytest

from vlm_jax.studies.glyphs import source

TINY = (("ocr", "rows4_tiny"), ("facts", "facts_tiny"), ("scene", "two_tiny"))


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    for family, config in TINY:
        source.build(family, config, folder / "data")
    return folder
