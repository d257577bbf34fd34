"""The tiny configs, built once a session."""

import pytest

from vlm_jax.data import sources

TINY = (("glyph_ocr", "rows4_tiny"), ("glyph_facts", "facts_tiny"), ("glyph_scene", "two_tiny"))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for dataset, config in TINY:
        sources.build(dataset, config, folder)
    return folder
