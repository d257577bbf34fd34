"""How fast a loaded PaliGemma reads an image with a prompt and answers, beside big_vision's own decoding.

    PYTHONPATH=big_vision python -m experiments.inference_speed.beside_big_vision --threads 1

One checkpoint of random float32 weights is written in big_vision's format, and both sides load it: all widths are those
of PaliGemma 3B at 224 pixels, and a part of its layers and of its vocabulary. big_vision runs what its evaluators run:
the prediction function `decode` with the sampler "greedy", on a model with the settings of its transfer configs,
except that the cache is float32 as everything else, where its default is bfloat16. Whether both say the same tokens is
checked. Writes beside_big_vision.json and its table in README.md.
"""

import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.inference_speed import measuring
from vlm_jax.cli import run_main

# By how much the layers of tower and language model, and the vocabulary, are divided.
MODELS = {"paligemma-3b-third": 3, "paligemma-3b": 1}
SIDE, VISUAL_TOKENS = 224, 256
# Standard deviations below that of all other weights. The embedding is the head too: with more noise in it, every
# answer repeats its last token; and with more in what attention gives, the image drowns that token.
_NOISE = {"input_embedding": 0.002, "attn_vec_einsum": 0.004}


def versions() -> dict[str, str]:
    import jax
    from big_vision import utils

    git = ["git", "-C", str(Path(utils.__file__).parent), "rev-parse", "--short=7", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {"jax": jax.__version__, "big_vision": commit or "of an unknown commit"}


def network_of(part: int) -> tuple[Any, Any]:
    """(big_vision's module, the config that its `load` reads)."""
    import ml_collections
    from big_vision.models.ppp import gemma
    from big_vision.models.proj.paligemma import paligemma

    size = {**gemma.get_config("gemma_2b"), "depth": 18 // part}
    gemma.get_config = lambda variant: ml_collections.ConfigDict(size)  # by itself it knows published depths alone
    image = {"variant": "So400m/14", "depth": 27 // part, "pool_type": "none", "scan": True}
    text = {"vocab_size": 257_152 // part // 128 * 128, "cache_dtype": None}
    config = ml_collections.FrozenConfigDict({"img": image, "llm": {"variant": "gemma_2b", **text}})
    return paligemma.Model(**config), config


def write_weights(path: Path, network: Any, side: int = SIDE) -> None:
    """A checkpoint in big_vision's format: no biases, norms that do nothing, and normal noise (see `_NOISE`)."""
    import jax
    from big_vision import utils

    from vlm_jax.checkpoints.big_vision import write_npz

    one = (np.zeros((1, side, side, 3), np.float32), np.zeros((1, 1), np.int32), np.zeros((1, 1), np.int32))
    abstract = jax.eval_shape(network.init, jax.random.key(0), *one)["params"]

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for name, leaf in utils.tree_flatten_with_names(abstract)[0]:
            if name.endswith(("scale", "bias")):
                value = float(name.endswith("scale") and name.startswith("img"))  # Gemma's scales are read as 1 + x
                yield f"params/{name}", np.full(leaf.shape, value, np.float32)
                continue
            draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(leaf.shape, np.float32)
            draw *= next((small for part, small in _NOISE.items() if part in name), 0.02)
            yield f"params/{name}", draw

    write_npz(path, arrays())


def both(name: str, folder: Path, threads: int) -> measuring.Sides:
    """Loads the same random weights into big_vision and vlm_jax."""
    import jax
    from big_vision.models.proj.paligemma import paligemma
    from big_vision.trainers.proj.paligemma import predict_fns

    import vlm_jax

    network, config = network_of(MODELS[name])
    file = folder / "model.npz"
    write_weights(file, network)
    state = {"params": jax.device_put(paligemma.load(None, str(file), config))}
    model = vlm_jax.load(file)
    decode = predict_fns.get_all(network)["decode"]

    def sides(batch: int, prompt_tokens: int) -> tuple[measuring.Generate, measuring.Generate]:
        rng = np.random.default_rng(batch)
        image = rng.uniform(-1, 1, (batch, SIDE, SIDE, 3)).astype(np.float32)
        text = rng.integers(10, 40_000, (batch, prompt_tokens - VISUAL_TOKENS), np.int32)
        real, prefix = np.ones(text.shape, bool), np.zeros_like(text)
        arrays = {"image": image, "text": text, "mask_input": real, "mask_ar": prefix, "_mask": np.ones(batch, bool)}
        arrays = jax.device_put(arrays)
        tokens = np.concatenate([np.full((batch, VISUAL_TOKENS), model.image_token), text], axis=1)

        def reference_tokens(new_tokens: int) -> np.ndarray:
            settings = {"devices": jax.devices(), "max_decode_len": new_tokens, "eos_token": -1, "sampler": "greedy"}
            return np.asarray(decode(state, arrays, **settings))

        return reference_tokens, lambda new_tokens: vlm_jax.generate_tokens(model, image, tokens, new_tokens)

    return sides


PEER = measuring.Peer(
    name="big_vision",
    models=tuple(MODELS),
    visual_tokens=VISUAL_TOKENS,
    prompt_tokens=VISUAL_TOKENS + 32,
    imports=("big_vision.trainers.proj.paligemma.predict_fns", "big_vision.models.proj.paligemma.paligemma"),
    versions=versions,
    open=both,
)


def main(argv: list[str]) -> None:
    measuring.main(argv, PEER, __doc__)


if __name__ == "__main__":
    run_main(main)
