"""Files that ship with the package: `configs/`, the study's encoder, the published scores and their law.

An installed package has them in `vlm_jax/shipped/` (setup.py lists them), a checkout at its top.
"""

import contextlib
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
SHIPPED = _PACKAGE / "shipped"


def located(path: str | Path) -> Path:
    """The path itself if it exists or is absolute, else the shipped file or folder of that relative path, if any."""
    path = Path(path)
    with contextlib.suppress(OSError, ValueError):  # too long, a NUL: reported where the path is read
        root = SHIPPED if SHIPPED.is_dir() else _PACKAGE.parent
        if not path.is_absolute() and ".." not in path.parts and not path.exists() and (root / path).exists():
            return root / path
    return path
