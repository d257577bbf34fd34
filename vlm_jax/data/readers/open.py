"""`open_source`: the data set that a `SourceSpec` names."""

import contextlib
import importlib
import importlib.metadata
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.specs import SourceSpec
from vlm_jax.data.examples import BadItem, Example, Source
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
}
_TRIED = 100  # items of which one must be usable
# Settings of `SourceSpec` that only some kinds use.
_USES = {
    "llava": ("images", "fields"),
    "jsonl": ("images", "fields"),
    "parquet": ("images", "config", "split", "fields", "options"),
    "tfds": ("config", "split", "fields"),
}


def open_source(spec: SourceSpec, cache_dir: Path) -> Source:
    """Opens a data set.

    Args:
        cache_dir: holds the hashes of large files.

    Raises `UserError` in one line for an unknown kind (with the nearest), a missing path or column (with those that are
    present), an unreadable file, a source without a usable item, and a class that cannot be used.
    """
    if spec.source in KINDS:
        for setting in ("images", "config", "split", "fields", "options"):
            if getattr(spec, setting) and setting not in _USES[spec.source]:
                raise UserError(
                    f"{setting}: sources of the kind {spec.source} have none, got {getattr(spec, setting)!r}"
                )
        source = KINDS[spec.source](spec, cache_dir)
    else:
        source = _open_class(spec, cache_dir)
    source = taken(source, spec.take)
    _check_usable(source, spec.path or spec.source)
    return source


def _check_usable(source: Source, where: str) -> None:
    """Raises `UserError` where items from all over the source are bad, without exception. Reads one if that is good."""
    first: tuple[int, BadItem] | None = None
    indices = np.unique(np.linspace(0, len(source) - 1, _TRIED).astype(int)).tolist()
    for index in indices:
        try:
            source.without_images(index)
        except BadItem as error:
            first = first or (index, error)
        else:
            return
    if first is not None:
        index, error = first
        raise UserError(
            f"{where}: expected usable items, got none of {len(indices)} that were read; number {index}, {error}"
        ) from error


def _open_class(spec: SourceSpec, cache_dir: Path) -> Source:
    """A user's own class, called with those of path, images, config and split that are set, with `options`, and with
    `cache_dir` if it has such a parameter.
    """
    where, source_class = f"source {spec.source!r}", _source_class(spec.source)
    if not (inspect.isclass(source_class) and issubclass(source_class, Source)):
        raise UserError(f"{where}: expected a subclass of vlm_jax.data.examples.Source, got {source_class!r}")
    arguments = {name: getattr(spec, name) for name in ("path", "images", "config", "split") if getattr(spec, name)}
    arguments |= dict(spec.options)
    if "cache_dir" in inspect.signature(source_class).parameters:
        arguments["cache_dir"] = cache_dir
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
        example = _first_example(source)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where}: {_described(error)}") from error
    if example is None:
        raise UserError(f"{where}: expected at least one example, got none")
    if not isinstance(example, Example):
        raise UserError(f"{where}: expected an Example from __getitem__, got {type(example).__name__}")
    return source


def _first_example(source: Source) -> Any:
    """The first example that can be used, an empty one where none can, None of an empty source."""
    for index in range(min(len(source), _TRIED)):
        with contextlib.suppress(BadItem):
            return source[index]
    return Example("", (), ()) if len(source) else None


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
