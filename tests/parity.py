"""Marks of a test that runs beside a peer library: `pytest -m parity`. Elsewhere the golden files stand for it."""

import importlib.util

import pytest


def beside(*names: str) -> pytest.MarkDecorator:
    """Skips the test where one of these cannot be imported."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} cannot be imported")


MARKS = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # the peers' own warnings
with_transformers = beside("torch", "transformers")
with_big_vision = beside("big_vision", "tensorflow")
