"""Beside transformers and big_vision themselves (tests/parity.py)."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints.test_vision_import import BV, HF, VLMS, close, write
from tests.golden import peers_llava_weights as llava_weights
from tests.golden import peers_vision as peers
from tests.parity import MARKS, beside, with_big_vision, with_transformers
from vlm_jax import export

pytestmark = MARKS


def same(found: dict[str, Any], golden: Any) -> None:
    assert set(found) == set(golden.files)
    for name, value in found.items():
        if value.dtype.kind == "f":
            close(value, golden[name], 1e-5)
        else:
            np.testing.assert_array_equal(value, golden[name])


def asked(folder: Path) -> dict[str, np.ndarray]:
    import torch
    import transformers

    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    model = getattr(transformers, name).from_pretrained(folder).eval()
    with torch.no_grad():
        return {key: value.numpy() for key, value in peers.ask(model, torch).items()}


@with_transformers
def test_the_golden_file_is_what_transformers_computes() -> None:
    same(peers.hugging_face(), HF)


@with_transformers
@beside("einops")
def test_the_golden_file_is_what_the_official_connectors_compute() -> None:
    if not {"LLAVA", "TOKENPACKER", "QUECC"} <= os.environ.keys():
        pytest.skip("LLAVA, TOKENPACKER and QUECC name no repositories")
    with np.load(llava_weights.GOLDEN) as golden:
        same(llava_weights.golden(), golden)


@with_transformers
@pytest.mark.parametrize("name", [*VLMS, "siglip_vision", "clip_vision"])
def test_transformers_computes_the_same_from_what_we_export(tmp_path, name: str) -> None:
    """Logits, image features and greedy text; of a tower, its tokens."""
    write(tmp_path / "in", name)
    export.main(["--model", str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    theirs, ours = asked(tmp_path / "in"), asked(tmp_path / "out")
    for key in set(theirs) - {"pooled"} if "clip" in name else theirs:
        np.testing.assert_allclose(ours[key], theirs[key], atol=1e-6)


@with_big_vision
def test_the_golden_file_is_what_big_vision_computes() -> None:
    same({name: np.asarray(value) for name, value in peers.big_vision().items()}, BV)


@with_big_vision
def test_big_vision_computes_the_same_from_what_we_export(tmp_path) -> None:
    """PaliGemma from a Hugging Face folder, through our names, into big_vision: the logits that transformers gave."""
    write(tmp_path / "in", "paligemma")
    export.main(["--model", str(tmp_path / "in"), "--out", str(tmp_path / "out.npz")])
    tokens, answer = (a[:, peers.PATCHES :] for a in peers.prompts(image_first=True))
    logits = peers.paligemma_of_big_vision("gemma", tmp_path / "out.npz", peers.pixels(18), tokens, answer)
    close(logits, HF["paligemma/logits"][:, peers.PATCHES :])
