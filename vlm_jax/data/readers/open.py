"""`open_source`: the data set that a `SourceSpec` names."""

import importlib
import importlib.metadata
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import SourceSpec
from vlm_jax.data.examples import Source
from vlm_jax.data.readers.jsonl import open_jsonl
from vlm_jax.data.readers.llava import open_llava
from vlm_jax.data.readers.mixture import taken
from vlm_jax.data.readers.parquet import open_parquet
from vlm_jax.data.readers.tfds import open_tfds

ENTRY_POINTS = "vlm_jax.sources"
KINDS: dict[str, Callable[[SourceSpec, Path], Source]] = {
    "llava": open_llava,
    "parquet": open_parquet,
    "jsonl": open_jsonl,
    "tfds": open_tfds,
    "glyphs": lambda spec, cache_dir: _open_glyphs(spec, cache_dir),
}
# Settings of `SourceSpec` that only some kinds use.
_USES = {
    "llava": ("images", "fields"),
    "jsonl": ("images", "fields"),
    "parquet": ("images", "config", "split", "fields", "options"),
    "tfds": ("config", "split", "fields"),
    "glyphs": ("config", "split"),
}


def open_source(spec: SourceSpec, cache_dir: Path) -> Source:
    """Opens a data set.

    Args:
        cache_dir: holds the hashes of large files, and the built glyph suite.

    Raises `UserError` in one line for an unknown kind (with the nearest), a missing path or column (with those that are
    present), an unreadable file, and a class that cannot be used.
    """
    if spec.source in KINDS:
        for setting in ("images", "config", "split", "fields", "options"):
            if getattr(spec, setting) and setting not in _USES[spec.source]:
                raise UserError(
                    f"{setting}: sources of the kind {spec.source} have none, got {getattr(spec, setting)!r}"
                )
        source = KINDS[spec.source](spec, cache_dir)
    else:
        source = _open_class(spec)
    return taken(source, spec.take)


def _open_glyphs(spec: SourceSpec, cache_dir: Path) -> Source:
    """A data set of the built-in suite, which is built first: path is its name, such as glyph_ocr."""
    from vlm_jax.data.sources import build

    folder = build(spec.path, spec.config, cache_dir / "data")
    return open_tfds(SourceSpec("tfds", path=str(folder), split=spec.split, name=spec.name), cache_dir)


def _open_class(spec: SourceSpec) -> Source:
    """A user's own class, called with those of path, images, config and split that are set, and with `options`."""
    where, source_class = f"source {spec.source!r}", _source_class(spec.source)
    if not (inspect.isclass(source_class) and issubclass(source_class, Source)):
        raise UserError(f"{where}: expected a subclass of vlm_jax.data.examples.Source, got {source_class!r}")
    arguments = {name: getattr(spec, name) for name in ("path", "images", "config", "split") if getattr(spec, name)}
    arguments |= dict(spec.options)
    if missing := sorted(getattr(source_class, "__abstractmethods__", ())):
        raise UserError(f"{where}: expected the methods {' and '.join(missing)}, which it does not define")
    try:
        inspect.signature(source_class).bind(**arguments)
    except TypeError as error:
        given = ", ".join(arguments) or "none"
        raise UserError(
            f"{where}: expected arguments {inspect.signature(source_class)}, got {given} ({error})"
        ) from error
    try:
        source = source_class(**arguments)
        count = len(source)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where}: {_described(error)}") from error
    if not count:
        raise UserError(f"{where}: expected at least one example, got none")
    return source


def _source_class(name: str) -> Any:
    points = {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    module, _, attribute = name.partition(":")
    try:
        if name in points:
            return points[name].load()
        if not attribute:
            raise unknown("kind of source", name, [*KINDS, *points, "package.module:Class"])
        loaded = importlib.import_module(module)
    except UserError:
        raise
    except Exception as error:  # anything that a module does when it is imported
        raise UserError(f"source {name!r}: cannot be imported ({_described(error)})") from error
    if not hasattr(loaded, attribute):
        classes = [key for key, value in vars(loaded).items() if inspect.isclass(value)]
        raise unknown(f"class of {module}", attribute, classes)
    return getattr(loaded, attribute)


def _described(error: Exception) -> str:
    """An exception of a user's code in one line, with the place where it was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    where = f", at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{where}"
