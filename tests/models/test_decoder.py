"""What the decoder promises, as mathematics."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import builders
from vlm_jax.core import tree
from vlm_jax.core.structs import AttentionMetadata, Cache, Params
from vlm_jax.models.cache import init_cache, pad_cache
from vlm_jax.models.decoder import Decoder, stack_layers, unstack_layers
from vlm_jax.ops import logical_axes

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
PACKED = [[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 2, 2, 3]]


def decoder(family: str = "llama", **compute: object) -> Decoder:
    return Decoder(dataclasses.replace(builders.DECODER, **FAMILIES[family]), builders.compute(**compute))


def unrolled(family: str = "llama", **compute: object) -> Decoder:
    return decoder(family, scan_layers=False, **compute)


def text(length: int = 7, rows: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 32, (rows, length)))


def causal(length: int = 7, rows: int = 2) -> AttentionMetadata:
    return builders.causal(np.ones((rows, length)))


def prefix(metadata: AttentionMetadata, length: int = 3) -> AttentionMetadata:
    """The first tokens of every conversation see each other both ways."""
    return metadata._replace(order=jnp.where(metadata.position < length, 0, metadata.position))


@functools.cache
def params_of(family: str = "llama", **spec: object):
    """Parameters of the scanned decoder."""
    module = decoder(family)
    module = Decoder(dataclasses.replace(module.spec, **spec), module.compute)
    return nn.meta.unbox(jax.jit(module.init)(jax.random.key(1), text(), causal()))["params"]


def apart(family: str = "llama"):
    return unstack_layers(params_of(family), builders.DECODER.depth)


def states(module: Decoder, params, tokens, metadata: AttentionMetadata, cache: Cache | None = None):
    """(last states, cache) of tokens alone."""
    x = module.apply({"params": params}, tokens, method="embed")
    return module.apply({"params": params}, x, metadata, cache, method="hidden")


def run(module: Decoder, params, tokens, metadata: AttentionMetadata) -> np.ndarray:
    return np.asarray(jax.jit(lambda p: states(module, p, tokens, metadata)[0])(params))


def assert_close(ours, theirs, share: float = 2e-6) -> None:
    """Within that share of the standard deviation: a few roundings of 2^-24."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=share * np.std(theirs))


@pytest.mark.parametrize("family", FAMILIES)
def test_causal(family: str) -> None:
    """The logits at i have exactly zero gradient with respect to every later embedding, and not with respect to their
    own.
    """
    module, variables = decoder(family), {"params": params_of(family)}
    x = module.apply(variables, text(), method="embed")

    @jax.jit
    @jax.grad
    def gradient(x, i):
        hidden, _ = module.apply(variables, x, causal(), method="hidden")
        return module.apply(variables, hidden, method="logits")[:, i].sum()

    for i in (0, 3, 6):
        size = np.abs(gradient(x, i)).sum(axis=(0, 2))
        assert np.all(size[i + 1 :] == 0)
        assert size[i] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_unrolled_layers_equal_scanned_ones(family: str) -> None:
    """States of packed rows, and the gradient of every parameter."""
    tokens, metadata = text(8), builders.causal(PACKED)
    pull = jnp.asarray(np.random.default_rng(2).standard_normal((2, 8, 16)), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def both(module, params):
        out, back = jax.vjp(lambda p: states(module, p, tokens, metadata)[0], params)
        return out, back(pull)[0]

    scanned, gradient = both(decoder(family), params_of(family))
    out, pieces = both(unrolled(family), apart(family))
    assert_close(out, scanned, 1e-6)
    ours, theirs = tree.flatten(stack_layers(pieces)), tree.flatten(gradient)
    assert ours.keys() == theirs.keys()
    scale = max(float(jnp.abs(leaf).max()) for leaf in theirs.values())
    for path in theirs:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=0, atol=1e-6 * scale, err_msg=path)


def test_both_layouts_hold_the_same_parameters() -> None:
    """`stack_layers` and `unstack_layers` are inverse, leave alone what is in their layout already, and give what the
    module of that layout initialises.
    """
    stacked, pieces = params_of("qwen2"), apart("qwen2")
    assert tree.sha256(stack_layers(pieces)) == tree.sha256(stacked)
    assert stack_layers(stacked) is stacked
    assert unstack_layers(pieces, builders.DECODER.depth) is pieces
    init = jax.eval_shape(unrolled("qwen2").init, jax.random.key(0), text(), causal())["params"]
    shapes = lambda params: {path: leaf.shape for path, leaf in tree.flatten(params).items()}  # noqa: E731
    assert shapes(nn.meta.unbox(init)) == shapes(pieces)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_in_pieces_equals_the_full_pass(family: str) -> None:
    """Into a cache that is made for the first piece and padded for the rest; it says what stands where."""
    module, params, tokens = unrolled(family), apart(family), text()

    @jax.jit
    def in_pieces(params):
        cache, pieces = init_cache(module.spec, module.compute, 2, 4), []
        for start, stop in ((0, 4), (4, 5), (5, 7)):
            place = AttentionMetadata(*(leaf[:, start:stop] for leaf in causal()))
            hidden, cache = states(module, params, tokens[:, start:stop], place, cache)
            cache = pad_cache(cache, 10)
            pieces.append(hidden)
        return jnp.concatenate(pieces, axis=1), cache

    out, cache = in_pieces(params)
    assert_close(out, run(decoder(family), params_of(family), tokens, causal()))
    assert int(cache.length) == 7
    for ours, theirs in zip(cache.metadata, causal(), strict=True):
        np.testing.assert_array_equal(ours, np.pad(theirs, ((0, 0), (0, 3))))
    assert {leaf.shape for leaf in (*cache.key, *cache.value)} == {(2, 2, 10, module.spec.head_dim)}
    assert len(cache.key) == len(cache.value) == module.spec.depth


def test_a_cache_is_for_unrolled_layers() -> None:
    module = decoder()
    cache = init_cache(module.spec, module.compute, 2, 7)
    with pytest.raises(ValueError, match="expected no cache with scan_layers=True"):
        states(module, params_of(), text(), causal(), cache)
    with pytest.raises(ValueError, match="expected a length of at least 7, the cache's own, got 3"):
        pad_cache(cache, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_conversations_equal_each_alone(family: str) -> None:
    """States of every conversation of a packed row, the later ones with a two-way prefix."""
    metadata, tokens = builders.causal(PACKED), text(8)
    metadata = metadata._replace(order=jnp.where(metadata.segment > 1, prefix(metadata).order, metadata.order))
    pieces = [(row, number) for row in (0, 1) for number in sorted(set(PACKED[row])) if number]
    # Each alone in a row of its own, at the head of it, below the packed rows.
    rows = [[*tokens], *([leaf[row] for row in (0, 1)] for leaf in metadata)]
    for row, number in pieces:
        where = np.flatnonzero(metadata.segment[row] == number)
        for leaf, column in zip((tokens, *metadata), rows, strict=True):
            column.append(jnp.pad(leaf[row, where], (0, 8 - len(where))))
    out = run(decoder(family), params_of(family), jnp.stack(rows[0]), AttentionMetadata(*map(jnp.stack, rows[1:])))
    for alone, (row, number) in zip(out[2:], pieces, strict=True):
        where = np.flatnonzero(metadata.segment[row] == number)
        assert_close(out[row, where], alone[: len(where)])


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_changes_nothing(family: str) -> None:
    """Whatever stands there: one text in rows that are padded behind, before and on both sides."""
    starts, tokens, segment = (0, 6, 2), np.full((3, 11), 9), np.zeros((3, 11))
    for row, start in enumerate(starts):
        tokens[row, start : start + 5], segment[row, start : start + 5] = text(5, 1)[0], 1
        tokens[row, :start] = row
    out = run(decoder(family), params_of(family), jnp.asarray(tokens), builders.causal(segment))
    behind, before, both = (out[row, start : start + 5] for row, start in enumerate(starts))
    assert_close(before, behind)
    assert_close(both, behind)


def test_ids_outside_the_table_are_placeholders() -> None:
    """What stands there is replaced, so any number will do, as long as it is a number."""
    module, variables = decoder(), {"params": params_of()}
    x = module.apply(variables, jnp.array([[-1, 32, 1 << 30, 5]]), method="embed")
    np.testing.assert_array_equal(x[0, 3], variables["params"]["embedding"][5])
    assert np.isfinite(x).all()


@pytest.mark.parametrize("scan_layers", [True, False])
def test_window_hides_what_lies_behind(scan_layers: bool) -> None:
    """With one local layer, the state at i depends on exactly the last `window` tokens."""
    spec = dataclasses.replace(builders.DECODER, depth=1, window=3)
    module, params = Decoder(spec, builders.compute(scan_layers=scan_layers)), params_of(depth=1, window=3)
    variables = {"params": params if scan_layers else unstack_layers(params, 1)}
    x = module.apply(variables, text(), method="embed")
    gradient = jax.jit(jax.grad(lambda x: module.apply(variables, x, causal(), method="hidden")[0][:, 5].sum()))
    size = np.abs(gradient(x)).sum((0, 2))
    assert [bool(s > 0) for s in size] == [False, False, False, True, True, True, False]


def test_prefix_is_seen_both_ways() -> None:
    module, variables, metadata = decoder(), {"params": params_of()}, prefix(causal())
    x = module.apply(variables, text(), method="embed")
    gradient = jax.jit(jax.grad(lambda x: module.apply(variables, x, metadata, method="hidden")[0][:, 0].sum()))
    size = np.abs(gradient(x)).sum((0, 2))
    assert [bool(s > 0) for s in size] == [True, True, True, False, False, False, False]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_splash_sees_what_the_mask_shows(family: str) -> None:
    """Asked for the fused kernel, states of packed rows are the same; a window shorter than the row keeps its mask."""
    metadata = builders.causal(PACKED)
    fused, plain = (
        run(decoder(family, attention=name), params_of(family), text(8), metadata) for name in ("splash", "xla")
    )
    assert_close(fused, plain)


@pytest.mark.parametrize("attention", ["splash", "xla"])
def test_packed_rows_form_no_mask_on_tpus(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowered for TPUs, forward and backward: splash gets the segments, and nothing of length x length is formed."""
    monkeypatch.setattr(logical_axes, "platform", lambda: "tpu")
    length, module, params = 384, decoder(attention=attention), params_of()
    metadata = builders.causal(np.repeat(PACKED, length // 8, axis=1))

    def total(params: Params, tokens: jax.Array) -> jax.Array:
        return states(module, params, tokens, metadata)[0].sum()

    program = jax.jit(jax.grad(total)).trace(params, text(length)).lower(lowering_platforms=("tpu",)).as_text()
    assert (f"{length}x{length}x" in program) == (attention == "xla")
    assert ("tpu_custom_call" in program) == (attention == "splash")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_scan_equals_a_loop_of_numpy(family: str) -> None:
    """The whole decoder against a transcription in float64 that shares no code with it."""
    module, params, tokens = decoder(family), params_of(family), text()
    np.testing.assert_allclose(
        jax.jit(module.apply)({"params": params}, tokens, causal()),
        reference(module.spec, params, np.asarray(tokens)),
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


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("policy", ["dots", "mlp", "block"])
def test_remat_changes_memory_and_not_gradients(policy: str, scan_layers: bool) -> None:
    """Gradients agree, and the rematerialised program keeps fewer residuals between forward and backward."""
    params = params_of() if scan_layers else apart()

    def loss(remat):
        module = decoder(remat=remat, scan_layers=scan_layers)
        return lambda p: jnp.sum(module.apply({"params": p}, text(), causal()) ** 2)

    plain, other = (jax.jit(jax.grad(loss(name)))(params) for name in ("none", policy))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, other)
    saved = [
        sum(np.prod(a.shape) for a in jax.tree.leaves(jax.eval_shape(lambda p, n=n: jax.vjp(loss(n), p)[1], params)))
        for n in ("none", policy)
    ]
    assert saved[1] < saved[0]
