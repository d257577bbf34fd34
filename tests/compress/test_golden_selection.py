"""Training-free compressors against the official code."""

import jax.numpy as jnp
import numpy as np

from tests.compress import official as ref
from vlm_jax.compress import selection
from vlm_jax.core.specs import CompressorSpec
from vlm_jax.core.structs import Evidence
from vlm_jax.models import merging


def test_golden_vision_zip():
    arrays = ref.read("visionzip")
    hidden, expected = arrays["hidden"], arrays["out"]
    dominant = arrays["index"].shape[1] - 1
    contextual = expected.shape[1] - 1 - dominant
    evidence = Evidence(
        jnp.asarray(hidden[:, 1:]),
        keys=jnp.asarray(arrays["metric"][:, 1:, None]),
        salience=jnp.asarray(arrays["scores"][:, :, 0, 1:].mean(1)),
        class_token=jnp.asarray(hidden[:, 0]),
    )
    ref.close(selection.zip_patches(evidence, dominant, contextual).tokens, expected)


def prumerge(name, arrays, expected, salience):
    x, keys = (arrays[part][: len(expected), 1:] for part in ("hidden", "keys"))
    spec = CompressorSpec(name, expected.shape[1], ref.side(x.shape[1]), x.shape[2], 0, 1, x.shape[2], 1, 1, 0)
    out = ref.run(spec, {}, tokens=x, keys=keys[:, :, None], salience=salience[: len(expected)])
    ref.close(out.tokens, expected)


def test_golden_prumerge():
    arrays = ref.read("prumerge")
    prumerge("prumerge", arrays, arrays["fixed"], arrays["cls"])
    prumerge("prumerge", arrays, arrays["adaptive"], arrays["cls"])
    prumerge("prumerge_plus", arrays, arrays["plus"], arrays["cls"])


def test_golden_divprune():
    arrays = ref.read("divprune")
    x = jnp.asarray(arrays["x"][None])
    for tokens, expected in ref.outputs(arrays, "picked").items():
        chosen = selection.choose_diverse(x, jnp.ones(x.shape[:2], bool), tokens)
        np.testing.assert_array_equal(chosen[0], expected)


def test_golden_tome():
    arrays = ref.read("tome")
    x, size = jnp.asarray(arrays["x"]), jnp.ones((*arrays["x"].shape[:2], 1))
    for step in (1, 2):
        pairs = x.shape[1] - arrays[f"out{step}"].shape[1]
        x, size = merging.merge(jnp.asarray(arrays[f"keys{step}"]), x, size, pairs, class_token=True)
        ref.close(x, arrays[f"out{step}"])
        np.testing.assert_array_equal(size, arrays[f"size{step}"])
    x = jnp.asarray(arrays["x"][:, 1:])
    pairs = x.shape[1] - arrays["out3"].shape[1]
    x, size = merging.merge(jnp.asarray(arrays["keys3"]), x, jnp.ones((*x.shape[:2], 1)), pairs, class_token=False)
    ref.close(x, arrays["out3"])
    np.testing.assert_array_equal(size, arrays["size3"])
