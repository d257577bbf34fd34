"""Runs the notebooks of this folder and stores their outputs: `python colabs/execute.py [NAME ...]`, all by default.

Each runs in a fresh kernel, from this folder. Stored pictures have 96 colours, which keeps the files small.
"""

import base64
import io
import sys
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

HERE = Path(__file__).parent
NAMES = ("quickstart", "compressors", "scaling_laws")
_CELL_SECS = 1200
_WIDTH = 900


def executed(name: str, env: Mapping[str, str] | None = None) -> NotebookNode:
    """The notebook with the outputs of a run in a fresh kernel. `env`: its environment variables (None: those of this
    process). Raises `nbclient.exceptions.CellExecutionError` for the first cell that fails.
    """
    notebook = nbformat.read(HERE / f"{name}.ipynb", 4)
    client = NotebookClient(
        notebook,
        timeout=_CELL_SECS,
        kernel_name="python3",
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(HERE)}},
    )
    return client.execute(**({} if env is None else {"env": dict(env)}))


def compact(notebook: NotebookNode) -> None:
    """Gives every picture a palette and at most `_WIDTH` pixels a line, in place."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
                picture.thumbnail((_WIDTH, picture.height))
                small = io.BytesIO()
                picture.quantize(96, dither=Image.Dither.NONE).save(small, "png", optimize=True)
                output.data["image/png"] = base64.b64encode(small.getvalue()).decode()


def main(argv: list[str]) -> None:
    for name in argv or NAMES:
        notebook = executed(name)
        compact(notebook)
        path = HERE / f"{name}.ipynb"
        nbformat.write(notebook, path)
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
