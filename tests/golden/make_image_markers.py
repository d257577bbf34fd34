"""Makes image_markers.json: where LLaVA-1.5 and LLaVA-NeXT put "<image>", from their own `preprocess_multimodal`.

    python -m tests.golden.make_image_markers FOLDER_OF_LLAVA FOLDER_OF_LLAVA_NEXT

The folders are git checkouts of haotian-liu/LLaVA (c121f043) and LLaVA-VL/LLaVA-NeXT (df179663). Only the text of that
one function is run, so that nothing has to be installed.
"""

import ast
import copy
import json
import re
import sys
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

PIECES = ("<image>", "<image>\n", "\n<image>", "What is this?", "Look at ", " and ", "\n", "  ", "Which?")


def conversations() -> list[list[dict[str, str]]]:
    """Drawn from pieces: two to four turns, human first."""
    rng, out = np.random.default_rng(0), []
    for _ in range(300):
        texts = ["".join(rng.choice(PIECES, rng.integers(1, 6))) for _ in range(2 * rng.integers(1, 3))]
        out.append([{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)])
    return out


def function(folder: Path) -> Any:
    """`preprocess_multimodal` of a checkout."""
    tree = ast.parse((folder / "llava" / "train" / "train.py").read_text())
    (found,) = (node for node in tree.body if getattr(node, "name", "") == "preprocess_multimodal")
    version = SimpleNamespace(default_conversation=SimpleNamespace(version="v1"))
    names = {"Sequence": typing.Sequence, "Dict": dict, "DataArguments": object, "conversation_lib": version, "re": re}
    names["DEFAULT_IMAGE_TOKEN"] = "<image>"
    exec(compile(ast.Module([found], []), str(folder), "exec"), names)
    return names["preprocess_multimodal"]


def main(argv: list[str]) -> None:
    arguments = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)
    talks = conversations()
    golden = {"given": [[turn["value"] for turn in talk] for talk in talks]}
    for name, folder in zip(("llava", "llava_next"), argv, strict=True):
        marked = function(Path(folder))(copy.deepcopy(talks), arguments)
        golden[name] = [[turn["value"] for turn in talk] for talk in marked]
    text = json.dumps(golden, separators=(",", ":"))
    (Path(__file__).parent / "image_markers.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
