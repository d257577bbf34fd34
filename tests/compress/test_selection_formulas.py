"""Compressors that choose or mix patches, against float64 NumPy with loops, on an oblong grid and with masks."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from vlm_jax.compress import catalog, selection
from vlm_jax.core.specs import CompressorSpec
from vlm_jax.core.structs import Evidence

B, E, D, GRID = 2, 8, 6, (4, 6)
PATCHES = GRID[0] * GRID[1]
masked = pytest.mark.parametrize("masked", [False, True])


def case(name, tokens, masked, **fields):
    rng = np.random.default_rng(0)
    spec = CompressorSpec(name, tokens, GRID, E, 0, D, E, 2, 1, 10, **fields)
    shapes = jax.eval_shape(lambda key: catalog.row(name).init_weights(key, spec), jax.random.key(0))
    weights = jax.tree.map(lambda x: rng.normal(size=x.shape), nn.meta.unbox(shapes))
    evidence = Evidence(
        rng.normal(size=(B, PATCHES, E)), rng.random((B, PATCHES)) < 0.7 if masked else None,
        keys=rng.normal(size=(B, PATCHES, 2, E // 2)), salience=rng.dirichlet(np.ones(PATCHES), B),
    )  # fmt: skip
    return spec, weights, evidence, rng.normal(size=(E, D))


def run(spec, weights, evidence, kernel):
    narrow = lambda x: jnp.asarray(x, None if x.dtype == bool else jnp.float32)  # noqa: E731
    weights, evidence, kernel = jax.tree.map(narrow, (weights, evidence, kernel))

    def apply(weights, evidence, kernel):
        return catalog.row(spec.name).apply(weights, evidence._replace(project=lambda x: x @ kernel), spec)

    return jax.jit(apply)(weights, evidence, kernel)


def real(evidence, b):
    return [p for p in range(PATCHES) if evidence.mask is None or evidence.mask[b, p]]


def norm(w, x, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * w["scale"] + w["bias"]


def softmax(x):
    share = np.exp(x - x.max(0))
    return share / share.sum(0)


@masked
def test_m3(masked):
    spec, weights, evidence, kernel = case("m3", 6, masked)
    out = run(spec, weights, evidence, kernel).tokens
    for b, i, j in np.ndindex(B, 2, 3):
        cell = [y * 6 + x for y in (2 * i, 2 * i + 1) for x in (2 * j, 2 * j + 1)]
        inside = [p for p in cell if p in real(evidence, b)]
        expected = (evidence.tokens[b, inside] @ kernel).mean(0) if inside else 0
        np.testing.assert_allclose(out[b, 3 * i + j], expected, atol=1e-4)


@masked
@pytest.mark.parametrize("name", ["idefics3", "pixel_shuffle"])
def test_pixel_shuffle(name, masked):
    spec, weights, evidence, kernel = case(name, 6, masked)
    out = run(spec, weights, evidence, kernel).tokens
    for b, i, j in np.ndindex(B, 2, 3):
        cell = [y * 6 + x for y in (2 * i, 2 * i + 1) for x in (2 * j, 2 * j + 1)]
        expected = np.concatenate([evidence.tokens[b, p] * (p in real(evidence, b)) for p in cell])
        if name == "pixel_shuffle":
            expected = norm(weights["norm"], expected, 1e-5)
        np.testing.assert_allclose(out[b, 3 * i + j], expected, atol=1e-4)


@masked
def test_token_learner(masked):
    spec, weights, evidence, kernel = case("token_learner", 5, masked)
    out = run(spec, weights, evidence, kernel).tokens
    for b in range(B):
        x, up, down = evidence.tokens[b, real(evidence, b)], weights["mlp"]["up"], weights["mlp"]["down"]
        y = norm(weights["norm"], x, 1e-6) @ up["kernel"] + up["bias"]
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        share = softmax(y @ down["kernel"] + down["bias"])
        np.testing.assert_allclose(out[b], share.T @ x, atol=1e-4)


@masked
def test_mqt_mixes_patches_with_weights_that_no_image_changes(masked):
    spec, weights, evidence, kernel = case("mqt", 3, masked, queries=4)
    out = run(spec, weights, evidence, kernel).tokens

    def table(rows, columns):
        frequency = 10_000.0 ** (-np.arange(E // 4) / (E / 4))
        return np.array([
            np.concatenate([f(at * frequency) for at in (x, y) for f in (np.sin, np.cos)])
            for y in range(rows) for x in range(columns)
        ])  # fmt: skip

    def cubic(d):
        d, a = abs(d), -0.75
        return ((a + 2) * d - (a + 3)) * d * d + 1 if d <= 1 else (((d - 5) * d + 8) * d - 4) * a if d < 2 else 0.0

    def taps(size, parts):
        out = np.zeros((parts, size))
        for i in range(parts):
            point = (i + 0.5) * size / parts - 0.5
            for k in range(int(np.floor(point)) - 1, int(np.floor(point)) + 3):
                out[i, min(max(k, 0), size - 1)] += cubic(point - k)
        return out

    positions = table(2, 2).astype(np.float16).astype(np.float64)
    places = np.einsum("ri,cj,ije->rce", taps(2, 4), taps(2, 6), positions.reshape(2, 2, E)).reshape(-1, E)
    attention = weights["attention"]

    def heads(name, y):
        return np.einsum("se,enc->nsc", y, attention[name]["kernel"]) + attention[name]["bias"][:, None]

    q = heads("query", norm(weights["query_norm"], weights["queries"][:3] + positions[:3], 1e-6))
    k = heads("key", norm(weights["key_norm"], places, 1e-6))
    for b in range(B):
        own = real(evidence, b)
        v = heads("value", norm(weights["value_norm"], evidence.tokens[b, own], 1e-6))
        share = softmax(np.einsum("ntc,nsc->snt", q, k[:, own]) / 2)
        mixed = np.einsum("snt,nsc->tnc", share, v)
        expected = np.einsum("tnc,nce->te", mixed, attention["out"]["kernel"]) + attention["out"]["bias"]
        np.testing.assert_allclose(out[b], expected, atol=1e-3)


@masked
def test_divprune(masked):
    spec, weights, evidence, kernel = case("divprune", 5, masked)
    out = run(spec, weights, evidence, kernel)
    for b in range(B):
        own, x = real(evidence, b), evidence.tokens[b] @ kernel
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        apart = lambda p, q, unit=unit: 1 - unit[p] @ unit[q]  # noqa: E731
        picked = [max(own, key=lambda p: min(apart(p, q) for q in own if q != p))]
        while len(picked) < 5:
            left = [p for p in own if p not in picked]
            picked.append(max(left, key=lambda p: min(apart(p, q) for q in picked)))
        np.testing.assert_allclose(out.tokens[b], x[sorted(picked)], atol=1e-4)
    assert out.mask is None or out.mask.all()


@masked
@pytest.mark.parametrize("class_token", [False, True])
def test_vision_zip(masked, class_token):
    spec, weights, evidence, kernel = case("vision_zip", 13, masked, key_width=E // 2)
    first = np.random.default_rng(4).normal(size=(B, E)) if class_token else None
    evidence = evidence._replace(class_token=first)
    out = run(spec, weights, evidence, kernel)
    contextual = selection.contextual_count(13)
    assert contextual == 2
    dominant = 13 - contextual - class_token
    for b in range(B):
        own, metric = real(evidence, b), evidence.keys[b].mean(1)
        score = [evidence.salience[b, p] if p in own else -1 for p in range(PATCHES)]
        best = sorted(np.argsort(-np.array(score), kind="stable")[:dominant])
        rest = [p for p in range(PATCHES) if p not in best]
        targets = [rest[i * (len(rest) // contextual)] for i in range(contextual)]
        members = {t: [] for t in targets}
        alike = lambda p, t, m=metric: m[p] @ m[t] / np.linalg.norm(m[p]) / np.linalg.norm(m[t])  # noqa: E731
        for p in rest:
            valid = [t for t in targets if t in own]
            if p not in targets and p in own and valid:
                members[max(valid, key=lambda t: alike(p, t))].append(p)
        x = evidence.tokens[b]
        merged = [x[t] + (x[members[t]].mean(0) if members[t] else 0) for t in targets]
        expected = [*([first[b]] if class_token else []), *x[best], *merged]
        shown = np.ones(13, bool) if out.mask is None else np.asarray(out.mask[b])
        np.testing.assert_array_equal(shown, [True] * class_token + [p in own for p in (*best, *targets)])
        np.testing.assert_allclose(out.tokens[b][shown], np.array(expected)[shown], atol=1e-4)


@masked
def test_ldpv2(masked):
    spec, weights, evidence, kernel = case("ldpv2", 6, masked)
    out = run(spec, weights, evidence, kernel)
    taps, bias = weights["conv"]["kernel"].reshape(3, 3, D), weights["conv"]["bias"]
    for b in range(B):
        y = np.zeros((4, 5, D))  # a border of zeros
        for i, j in np.ndindex(2, 3):
            cell = [r * 6 + c for r in (2 * i, 2 * i + 1) for c in (2 * j, 2 * j + 1)]
            inside = [p for p in cell if p in real(evidence, b)]
            y[i + 1, j + 1] = (evidence.tokens[b, inside] @ kernel).mean(0) if inside else 0
        for i, j in np.ndindex(2, 3):
            expected = y[i + 1, j + 1] + (taps * y[i : i + 3, j : j + 3]).sum((0, 1)) + bias
            np.testing.assert_allclose(out.tokens[b, 3 * i + j], expected, atol=1e-4)


@masked
@pytest.mark.parametrize("depth", [1, 2])
def test_perceiver(depth, masked):
    spec, weights, evidence, kernel = case("perceiver", 3, masked)
    spec = dataclasses.replace(spec, depth=depth)
    shapes = jax.eval_shape(lambda key: catalog.row("perceiver").init_weights(key, spec), jax.random.key(0))
    rng = np.random.default_rng(2)
    weights = jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.5), nn.meta.unbox(shapes))
    out = run(spec, weights, evidence, kernel).tokens
    for b in range(B):
        z, x = weights["latents"], evidence.tokens[b, real(evidence, b)]
        for i in range(depth):
            w = weights[f"layer{i}"]
            q = norm(w["latent_norm"], z, 1e-5)
            both = np.concatenate([norm(w["media_norm"], x, 1e-5), q])
            a = w["attention"]
            queries, keys, values = (
                np.einsum("se,enc->nsc", y, a[name]["kernel"])
                for name, y in (("query", q), ("key", both), ("value", both))
            )
            share = softmax(np.einsum("ntc,nsc->snt", queries, keys) / 2)
            z = z + np.einsum("snt,nsc,nce->te", share, values, a["out"]["kernel"])
            y = norm(w["mlp_norm"], z, 1e-5) @ w["mlp"]["up"]["kernel"]
            z = z + y * 0.5 * (1 + erf(y / np.sqrt(2))) @ w["mlp"]["down"]["kernel"]
        np.testing.assert_allclose(out[b], norm(weights["norm"], z, 1e-5), atol=1e-3)
