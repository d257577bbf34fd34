"""What the decoder promises, as mathematics."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import builders
from vlm_jax.models.decoder import Decoder, empty_cache
from vlm_jax.ops import masks

FAMILIES = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "tied_head": False},
    "qwen3": {"qk_norm": True, "head_dim": 6},
    "gemma2": dict(
        sandwich_norm=True, norm_plus_one=True, activation="gelu_tanh", scale_embedding=True, attention_softcap=5.0,
        logit_softcap=3.0, window=3, window_pattern=2, query_scale=0.3,
    ),
    "gemma3": dict(sandwich_norm=True, qk_norm=True, window=2, window_pattern=2, local_rope_theta=100.0,
    rope_factor=8.0), "mistral": {"window": 3},
}  # fmt: skip


def decoder(family: str = "llama", **compute: object) -> Decoder:
    return Decoder(dataclasses.replace(builders.DECODER, **FAMILIES[family]), builders.compute(**compute))


def text_and_slots(length: int = 7, rows: int = 2, mask: str = "causal"):
    text = jnp.asarray(np.random.default_rng(0).integers(0, 32, (rows, length)))
    position = jnp.broadcast_to(jnp.arange(length), (rows, length))
    return text, masks.image_and_text(0, jnp.ones_like(text), position, position < 3, mask)


def params_of(module: Decoder):
    text, slots = text_and_slots()
    return nn.meta.unbox(jax.jit(module.init)(jax.random.key(1), text, slots))


@pytest.mark.parametrize("family", FAMILIES)
def test_causal(family: str) -> None:
    """The logits at i have exactly zero gradient with respect to every later embedding, and not with respect to their
    own.
    """
    module = decoder(family)
    variables = params_of(module)
    text, slots = text_and_slots()
    x = module.apply(variables, text, method="embed")

    @jax.jit
    @jax.grad
    def gradient(x, i):
        hidden, _ = module.apply(variables, x, slots, method="hidden")
        return module.apply(variables, hidden, method="logits")[:, i].sum()

    for i in (0, 3, 6):
        size = np.abs(gradient(x, i)).sum(axis=(0, 2))
        assert np.all(size[i + 1 :] == 0)
        assert size[i] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_extend_equal_the_full_pass(family: str) -> None:
    module = decoder(family)
    variables = params_of(module)
    text, slots = text_and_slots()
    full = jax.jit(module.apply)(variables, text, slots)

    @jax.jit
    def in_pieces(variables):
        cache, pieces = empty_cache(module.spec, 2, 10, "float32"), []
        for start, stop in ((0, 4), (4, 5), (5, 7)):
            x = module.apply(variables, text[:, start:stop], method="embed")
            place = masks.Slots(*(a[:, start:stop] for a in slots))
            hidden, cache = module.apply(variables, x, place, cache, method="hidden")
            pieces.append(module.apply(variables, hidden, method="logits"))
        return jnp.concatenate(pieces, axis=1), cache

    logits, cache = in_pieces(variables)
    np.testing.assert_allclose(logits, full, atol=2e-5)
    assert int(cache.used) == 7


def test_window_hides_what_lies_behind() -> None:
    """With one local layer, the state at i depends on exactly the last `window` tokens."""
    module = Decoder(dataclasses.replace(builders.DECODER, depth=1, window=3), builders.COMPUTE)
    variables = params_of(module)
    text, slots = text_and_slots()
    x = module.apply(variables, text, method="embed")
    gradient = jax.jit(jax.grad(lambda x: module.apply(variables, x, slots, method="hidden")[0][:, 5].sum()))
    size = np.abs(gradient(x)).sum((0, 2))
    assert [bool(s > 0) for s in size] == [False, False, False, True, True, True, False]


def test_prefix_is_seen_both_ways() -> None:
    module = decoder()
    variables = params_of(module)
    text, slots = text_and_slots(mask="prefix")
    x = module.apply(variables, text, method="embed")
    gradient = jax.jit(jax.grad(lambda x: module.apply(variables, x, slots, method="hidden")[0][:, 0].sum()))
    size = np.abs(gradient(x)).sum((0, 2))
    assert [bool(s > 0) for s in size] == [True, True, True, False, False, False, False]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_scan_equals_a_loop_of_numpy(family: str) -> None:
    """The whole decoder against a transcription in float64 that shares no code with it."""
    module = decoder(family)
    variables = params_of(module)
    text, slots = text_and_slots()
    np.testing.assert_allclose(
        jax.jit(module.apply)(variables, text, slots),
        reference(module.spec, variables["params"], np.asarray(text)),
        atol=3e-5,
    )


def reference(spec, params, text):
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, w):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.norm_eps) * (w + spec.norm_plus_one)

    def act(x):
        if spec.activation == "silu":
            return x / (1 + np.exp(-x))
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def turn(x):  # [L, C], by complex multiplication
        half = x.shape[1] // 2
        turns = np.arange(len(x))[:, None] * spec.rope_theta ** (-np.arange(half) / half)
        z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * turns)
        return np.concatenate([z.real, z.imag], axis=1)

    out = []
    for row in text:
        x = params["embedding"][row] * (np.sqrt(spec.width) if spec.scale_embedding else 1)
        for i in range(spec.depth):
            p = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
            y, mixed = norm(x, p["attention_norm"]["scale"]), 0
            for head in range(spec.heads):
                group = head // (spec.heads // spec.kv_heads)
                q = turn(y @ p["attention"]["query"]["kernel"][:, head])
                k = turn(y @ p["attention"]["key"]["kernel"][:, group])
                scores = q @ k.T * (spec.query_scale or spec.head_dim**-0.5)
                if spec.attention_softcap:
                    scores = spec.attention_softcap * np.tanh(scores / spec.attention_softcap)
                for a in range(len(row)):
                    for b in range(len(row)):
                        far = spec.window and (i + 1) % spec.window_pattern != 0 and a - b >= spec.window
                        if b > a or far:
                            scores[a, b] = -np.inf
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                mixed = (
                    mixed
                    + weights
                    @ (y @ p["attention"]["value"]["kernel"][:, group])
                    @ p["attention"]["out"]["kernel"][head]
                )
            x = x + (norm(mixed, p["attention_post_norm"]["scale"]) if spec.sandwich_norm else mixed)
            y = norm(x, p["mlp_norm"]["scale"])
            y = (act(y @ p["mlp"]["gate"]["kernel"]) * (y @ p["mlp"]["up"]["kernel"])) @ p["mlp"]["down"]["kernel"]
            x = x + (norm(y, p["mlp_post_norm"]["scale"]) if spec.sandwich_norm else y)
        logits = norm(x, params["norm"]["scale"]) @ params["embedding"].T
        out.append(spec.logit_softcap * np.tanh(logits / spec.logit_softcap) if spec.logit_softcap else logits)
    return np.stack(out)


@pytest.mark.parametrize("policy", ["dots", "block"])
def test_remat_changes_memory_and_not_gradients(policy: str) -> None:
    """Gradients agree, and the rematerialised program keeps fewer residuals between forward and backward."""
    text, slots = text_and_slots()
    variables = params_of(decoder())

    def loss(remat):
        module = decoder(remat=remat)
        return lambda v: jnp.sum(module.apply(v, text, slots) ** 2)

    plain, other = (jax.jit(jax.grad(loss(name)))(variables) for name in ("none", policy))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, other)
    saved = [
        sum(np.prod(a.shape) for a in jax.tree.leaves(jax.eval_shape(lambda v, n=n: jax.vjp(loss(n), v)[1], variables)))
        for n in ("none", policy)
    ]
    assert saved[1] < saved[0]
