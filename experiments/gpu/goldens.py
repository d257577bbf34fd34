"""Models of the committed golden files: their checkpoint, their prompt, and the logits of the reference library.

The files hold shapes and outputs, the weights are drawn from the tensors' names (`tests.golden.drawn`). References are
transformers, big_vision, and the connectors of LLaVA, TokenPacker and QueCC, in float32 on a CPU.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import save_file

import vlm_jax
from tests.golden import drawn, peers_decoders, peers_llava_weights, peers_vision
from vlm_jax.inference import programs, prompts

_VLMS = ("llava", "llava_siglip", "paligemma", "paligemma2", "paligemma2_narrow")
_BIG_VISION = ("paligemma_gemma", "paligemma_gemma_full_heads", "paligemma_gemma2")


class Golden(NamedTuple):
    """A model and what its reference computed for a prompt."""

    name: str
    write: Callable[[Path], Path]  # writes the checkpoint under an empty folder
    tokens: np.ndarray  # [B, T]
    mask: np.ndarray | None  # [B, T], 0 on padding
    answer: np.ndarray | None  # [B, T], 1 after a bidirectional prefix
    pixels: np.ndarray | None  # normalised float[B, H, H, 3]
    questions: Sequence[Sequence[int]] | None
    logits: np.ndarray  # [B, t, W], of the last t tokens


def read() -> list[Golden]:
    """All of them, different families first."""
    kinds = (list(_decoders()), list(_hugging_face()), list(_llava()), list(_big_vision()))
    longest = max(map(len, kinds))
    return [kind[place] for place in range(longest) for kind in kinds if place < len(kind)]


def logits(golden: Golden, folder: Path, dtype: str) -> np.ndarray:
    """float32 logits [B, T, W] of the loaded checkpoint, through the programs of `vlm_jax.forward`; zero on padding."""
    model = vlm_jax.load(golden.write(folder), dtype=dtype)
    images = prompts.images_by_row(model, golden.pixels, len(golden.tokens))
    inputs = prompts.inputs_of(model, images, golden.tokens, golden.mask, golden.answer, golden.questions)
    config = (model.spec, model.compute, model.plan)
    hidden = programs.hidden_program(*config)(model.params, prompts.put(prompts.to_bucket(inputs, model), model.plan))
    found = programs.logits_program(*config)(model.params, hidden[:, : golden.tokens.shape[1]])
    found = np.asarray(jax.device_get(found), np.float32)
    return found if golden.mask is None else found * golden.mask[..., None]


def _decoders() -> Any:
    tokens, mask = peers_decoders.prompts()
    for name, case in peers_decoders.read().items():
        write = functools.partial(_write_folder, config=case.config, shapes=case.shapes)
        yield Golden(f"transformers {name}", write, tokens, mask, None, None, None, case.logits)


def _hugging_face() -> Any:
    stored = _load(Path(peers_vision.__file__).with_name("peers_vision_hf.npz"))
    for name in _VLMS:
        files = json.loads(str(stored[f"{name}/files"]))
        write = functools.partial(_write_folder, config=files["config"], shapes=files["shapes"])
        has_prefix = name.startswith("paligemma")
        tokens, answer = peers_vision.prompts(image_first=has_prefix)
        pixels = peers_vision.pixels(18)
        yield Golden(
            f"transformers {name}", write, tokens, np.ones_like(tokens), answer if has_prefix else None, pixels, None,
            stored[f"{name}/logits"],
        )  # fmt: skip


def _llava() -> Any:
    stored = _load(peers_llava_weights.GOLDEN)
    for name, (_, count, _) in peers_llava_weights.CASES.items():
        files = json.loads(str(stored[f"{name}/files"]))
        _, tokens = peers_llava_weights.prompt(count)
        questions = [peers_llava_weights.QUESTION] * len(tokens) if name.startswith("quecc") else None
        yield Golden(
            f"official {name}", functools.partial(_write_llava, files=files), tokens, np.ones_like(tokens), None,
            peers_llava_weights.pixels(), questions, stored[f"{name}/logits"],
        )  # fmt: skip


def _big_vision() -> Any:
    stored = _load(Path(peers_vision.__file__).with_name("peers_vision_bv.npz"))
    for name in _BIG_VISION:
        shapes = json.loads(str(stored[f"{name}/files"]))["shapes"]
        tokens, answer = peers_vision.prompts(image_first=True)
        # These checkpoints have no placeholder: it is the id behind the vocabulary.
        tokens[:, : peers_vision.PATCHES] = peers_vision.BV_TEXT["vocab_size"]
        yield Golden(
            f"big_vision {name}", functools.partial(_write_npz, shapes=shapes), tokens, np.ones_like(tokens), answer,
            peers_vision.pixels(16), None, stored[f"{name}/logits"],
        )  # fmt: skip


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def _write_folder(root: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    save_file(drawn.weights(shapes), root / "model.safetensors")
    (root / "config.json").write_text(json.dumps(config))
    return root


def _write_llava(root: Path, files: dict[str, Any]) -> Path:
    """With the tower's folder beside it, where LLaVA's own code has only its name."""
    tower = files["tower"]
    side = tower["config"]["image_size"]
    beside = _write_folder(root / "clip-vit-large-patch14-336", tower["config"], tower["shapes"])
    processor = {"size": side, "crop_size": side, "do_center_crop": True, "resample": 3}
    (beside / "preprocessor_config.json").write_text(json.dumps(processor))
    return _write_folder(root / "model", files["config"], files["shapes"])


def _write_npz(root: Path, shapes: dict[str, list[int]]) -> Path:
    np.savez(root / "model.npz", **peers_vision.bv_weights(shapes))
    return root / "model.npz"
