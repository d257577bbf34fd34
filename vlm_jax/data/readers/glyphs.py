"""The built-in glyph suite as a source: `path` is the data set, `config` and `split` as for TFDS."""

import dataclasses
from pathlib import Path

from vlm_jax.core.specs import SourceSpec
from vlm_jax.data.examples import Source
from vlm_jax.data.readers.tfds import open_tfds


def open_glyphs(spec: SourceSpec, cache_dir: Path) -> Source:
    """Opens a data set of the suite ("glyph_ocr", config "rows4"), and builds it in `cache_dir` first if it does not
    exist. Raises `UserError`.
    """
    from vlm_jax.data.sources import build

    folder = build(spec.path, spec.config, cache_dir / "data")
    return open_tfds(dataclasses.replace(spec, source="tfds", path=str(folder), config=""), cache_dir)
