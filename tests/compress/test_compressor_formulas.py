"""Every method against its formula, transcribed into float64 NumPy with loops over cells, bins, heads and layers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from vlm_jax.compress import catalog, querying
from vlm_jax.core.specs import CompressorSpec
from vlm_jax.core.structs import Evidence

B, E, D, WIDTH, HEADS, GRID = 2, 6, 5, 8, 2, (4, 6)
PATCHES = GRID[0] * GRID[1]


def _spec(name, tokens, taps=0, depth=1, mlp_width=10, grid=GRID):
    return CompressorSpec(name, tokens, grid, E, taps, D, WIDTH, HEADS, depth, mlp_width)


def _case(spec, masked, seed=0):
    """Weights, inputs and mask, float64; the mask empties the top left quarter of the first image."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: catalog.row(spec.name).init_weights(key, spec), jax.random.key(0))
    weights = jax.tree.map(lambda x: rng.normal(size=x.shape), nn.meta.unbox(shapes))
    h, w = spec.grid
    tokens, text = rng.normal(size=(B, h * w, E)), rng.normal(size=(B, D))
    taps = rng.normal(size=(B, spec.taps, h * w, E)) if spec.taps else None
    mask = rng.random((B, h * w)) < 0.6 if masked else None
    if masked:
        mask.reshape(B, h, w)[0, : h // 2, : w // 2] = False
    return weights, Evidence(tokens, mask, taps), text


def _run(spec, weights, visual, text):
    to_float32 = lambda x: jnp.asarray(x, None if x.dtype == bool else jnp.float32)  # noqa: E731
    weights, visual, text = jax.tree.map(to_float32, (weights, visual, text))
    return _jitted(spec)(weights, visual._replace(question_vector=text))


@functools.cache
def _jitted(spec):
    return jax.jit(lambda *inputs: catalog.row(spec.name).apply(*inputs, spec))


def _assert_equals(out, want, real=None):
    np.testing.assert_allclose(out.tokens, want, rtol=2e-4, atol=2e-4)
    if real is None:
        assert out.mask is None
    else:
        np.testing.assert_array_equal(out.mask, real)


def linear(w, x):
    return x @ w["kernel"] + w.get("bias", 0)


def norm(w, x):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * w["scale"] + w["bias"]


def mlp(w, x):
    y = linear(w["up"], x)
    return linear(w["down"], y * 0.5 * (1 + erf(y / np.sqrt(2))))


def attend(w, query, keys, values, place=None):
    """One query, a list of keys: [width], [S, width], [S, width] -> [outputs]; place [N, S] is added to the scores."""
    out = w["out"]["bias"].copy()
    if not len(keys):
        return out
    for n in range(HEADS):
        q, k, v = (
            x @ w[p]["kernel"][:, n] + w[p]["bias"][n] for p, x in (("query", query), ("key", keys), ("value", values))
        )
        score = k @ q / np.sqrt(WIDTH // HEADS) + (0 if place is None else place[n])
        share = np.exp(score - score.max())
        out += (share / share.sum() @ v) @ w["out"]["kernel"][n]
    return out


def _bins(size, parts):
    return [range(int(np.floor(i * size / parts)), int(np.ceil((i + 1) * size / parts))) for i in range(parts)]


POOLED = [(1, (1, 1)), (2, (1, 2)), (5, (1, 5)), (8, (2, 4)), (15, (3, 5))]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("tokens", "shape"), POOLED)
def test_pool(tokens, shape, masked):
    spec = _spec("pool", tokens)
    weights, visual, text = _case(spec, masked)
    real = np.ones((B, PATCHES), bool) if visual.mask is None else visual.mask
    want, kept = np.zeros((B, tokens, E)), np.zeros((B, tokens), bool)
    for b in range(B):
        bins = [(rows, columns) for rows in _bins(GRID[0], shape[0]) for columns in _bins(GRID[1], shape[1])]
        for v, (rows, columns) in enumerate(bins):
            inside = [y * GRID[1] + x for y in rows for x in columns if real[b, y * GRID[1] + x]]
            if inside:
                want[b, v], kept[b, v] = visual.tokens[b, inside].mean(0), True
    _assert_equals(_run(spec, weights, visual, text), want, kept if masked else None)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "tokens"), [("none", PATCHES), ("blind", 0)])
def test_both_ends(name, tokens, masked):
    spec = _spec(name, tokens)
    weights, visual, text = _case(spec, masked)
    out = _run(spec, weights, visual, text)
    _assert_equals(out, visual.tokens[:, :tokens], visual.mask[:, :tokens] if masked else None)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("tokens", "depth", "mlp_width"), [(1, 1, 10), (5, 3, 10), (5, 2, 0), (24, 1, 0)])
def test_resampler(tokens, depth, mlp_width, masked):
    spec = _spec("resampler", tokens, depth=depth, mlp_width=mlp_width)
    weights, visual, text = _case(spec, masked)
    want = np.zeros((B, tokens, E))
    for b in range(B):
        real = slice(None) if visual.mask is None else visual.mask[b]
        patches = linear(weights["project_in"], visual.tokens[b][real])
        for v in range(tokens):
            x = weights["queries"][v]
            for i in range(depth):
                w = weights[f"layer{i}"]
                y = norm(w["key_norm"], patches)
                x = x + attend(w["attention"], norm(w["query_norm"], x), y, y, weights["place"][v][:, real])
                if mlp_width:
                    x = x + mlp(w["mlp"], norm(w["mlp_norm"], x))
            want[b, v] = linear(weights["project_out"], norm(weights["norm"], x))
    _assert_equals(_run(spec, weights, visual, text), want, np.ones((B, tokens), bool) if masked else None)


def _cells(grid, shape):
    """Lists of patch numbers, one a cell."""
    (h, w), (r, c) = grid, shape
    return [
        [y * w + x for y in range(i * h // r, (i + 1) * h // r) for x in range(j * w // c, (j + 1) * w // c)]
        for i, j in np.ndindex(r, c)
    ]


def _cell_tokens(weights, spec, visual, query_of, cells):
    """The part that local methods share: query (b, v) attends to the real patches of cell v, if it has any."""
    want, kept = np.zeros((B, spec.tokens, E)), np.zeros((B, spec.tokens), bool)
    for b, v in np.ndindex(B, spec.tokens):
        layers = visual.tokens[None, b] if visual.taps is None else visual.taps[b]
        real = [p for p in cells[v] if visual.mask is None or visual.mask[b, p]]
        side_by_side = [np.concatenate([layer[p] for layer in layers]) for p in real]
        keys, values = (
            [norm(weights[f"{n}_norm"], mlp(weights[n], z)) for z in side_by_side] for n in ("keys", "values")
        )
        want[b, v] = attend(weights["attention"], query_of(b, v), np.array(keys), np.array(values))
        kept[b, v] = bool(real)
    return want, kept


LOCAL = [(1, (1, 1)), (2, (1, 2)), (6, (2, 3)), (8, (4, 2)), (24, (4, 6))]


@pytest.mark.parametrize(("taps", "masked"), [(0, False), (3, True)])
@pytest.mark.parametrize(("tokens", "shape"), LOCAL)
def test_tokenpacker(tokens, shape, taps, masked):
    spec = _spec("tokenpacker", tokens, taps)
    weights, visual, text = _case(spec, masked)

    def coarse(b, v):
        """Bilinear reading at the centre of cell v, over the real ones of its neighbours."""
        (i, j), total, share = divmod(v, shape[1]), np.zeros(E), 0.0
        y, x = ((k + 0.5) * size / parts - 0.5 for k, size, parts in zip((i, j), GRID, shape, strict=True))
        for down, right in np.ndindex(2, 2):
            row, column = int(np.floor(y)) + down, int(np.floor(x)) + right
            weight = (1 - abs(y - row)) * (1 - abs(x - column))
            place = row * GRID[1] + column
            if weight > 0 and (visual.mask is None or visual.mask[b, place]):
                total, share = total + weight * visual.tokens[b, place], share + weight
        return total / share if share else total

    def query(b, v):
        return norm(weights["query_norm"], linear(weights["query"], coarse(b, v)))

    want, kept = _cell_tokens(weights, spec, visual, query, _cells(GRID, shape))
    _assert_equals(_run(spec, weights, visual, text), want, kept if masked else None)


@pytest.mark.parametrize(("taps", "masked"), [(0, False), (3, True)])
@pytest.mark.parametrize(("tokens", "shape"), LOCAL)
def test_quecc(tokens, shape, taps, masked):
    spec = _spec("quecc", tokens, taps)
    weights, visual, text = _case(spec, masked)
    cells = _cells(GRID, shape)

    def query(b, v):
        question = norm(weights["text_norm"], linear(weights["text"], text[b]))
        total = weights["down"]["bias"].copy()
        for s, place in enumerate(cells[v]):
            if visual.mask is None or visual.mask[b, place]:
                fine = norm(weights["query_norm"], mlp(weights["query"], visual.tokens[b, place] + question))
                total += weights["down"]["kernel"][s] * fine
        return total

    want, kept = _cell_tokens(weights, spec, visual, query, cells)
    _assert_equals(_run(spec, weights, visual, text), want, kept if masked else None)


@pytest.mark.parametrize("name", ["tokenpacker", "quecc"])
@pytest.mark.parametrize(("tokens", "shape"), [(2, (1, 2)), (6, (2, 3))])
def test_a_local_token_reads_its_own_cell_alone(name, tokens, shape):
    spec = _spec(name, tokens, taps=2)
    weights, visual, text = _case(spec, masked=False)
    token_sums = lambda t, z: _run(spec, weights, Evidence(t, taps=z), text).tokens[0].sum(-1)  # noqa: E731
    inputs = (jnp.asarray(x, jnp.float32) for x in (visual.tokens, visual.taps))
    by_tokens, by_taps = map(np.asarray, jax.jit(jax.jacrev(token_sums, (0, 1)))(*inputs))
    for v, cell in enumerate(_cells(GRID, shape)):
        reads = np.abs(by_tokens[v, 0]).sum(-1) + np.abs(by_taps[v, 0]).sum((0, -1))
        assert set(np.flatnonzero(reads)) == set(cell)


@pytest.mark.parametrize("name", ["tokenpacker", "quecc"])
def test_moving_whole_cells_moves_the_tokens_with_them(name):
    spec = _spec(name, 6, taps=2)
    weights, visual, text = _case(spec, masked=True)
    order, cells = np.random.default_rng(5).permutation(6), _cells(GRID, (2, 3))
    move = np.zeros(PATCHES, int)
    for new, old in enumerate(order):
        move[cells[new]] = cells[old]
    moved = Evidence(visual.tokens[:, move], visual.mask[:, move], visual.taps[:, :, move])
    before, after = (_run(spec, weights, v, text) for v in (visual, moved))
    np.testing.assert_allclose(after.tokens, before.tokens[:, order], atol=1e-5)
    assert (after.mask == before.mask[:, order]).all()


def test_the_resampler_sees_a_set_of_patches_at_positions():
    """Patches moved with their positions change nothing; queries moved move the tokens; positions do matter."""
    spec = _spec("resampler", 4, depth=2)
    weights, visual, text = _case(spec, masked=False)
    rng = np.random.default_rng(5)
    move, order = rng.permutation(PATCHES), rng.permutation(4)
    moved = Evidence(visual.tokens[:, move])
    before = _run(spec, weights, Evidence(visual.tokens), text).tokens
    same = _run(spec, weights | {"place": weights["place"][:, :, move]}, moved, text).tokens
    other = _run(spec, weights, moved, text).tokens
    turned = {name: weights[name][order] for name in ("queries", "place")}
    turned = _run(spec, weights | turned, Evidence(visual.tokens), text).tokens
    np.testing.assert_allclose(same, before, atol=1e-4)
    np.testing.assert_allclose(turned, before[:, order], atol=1e-5)
    assert np.abs(other - before).max() > 0.01


def test_pool_ignores_order_inside_a_bin():
    spec = _spec("pool", 6)
    weights, visual, text = _case(spec, masked=True)
    move = np.arange(PATCHES)
    for cell in _cells(GRID, (2, 3)):
        move[cell] = np.random.default_rng(cell[0]).permutation(cell)
    before = _run(spec, weights, visual, text)
    after = _run(spec, weights, Evidence(visual.tokens[:, move], mask=visual.mask[:, move]), text)
    np.testing.assert_allclose(after.tokens, before.tokens, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 4, 23])
def test_heads_of_the_resampler_start_at_places_of_their_own(tokens):
    """Where a head first looks, on average, is a place of its own, and all of them together reach over the grid."""
    spec = _spec("resampler", tokens)
    place = np.asarray(querying.initial_bias(spec))
    assert place.shape == (tokens, HEADS, PATCHES)
    share = np.exp(place) / np.exp(place).sum(-1, keepdims=True)
    rows, columns = np.divmod(np.arange(PATCHES), GRID[1])
    centre = np.stack([share @ rows, share @ columns], axis=-1).reshape(-1, 2)
    apart = np.abs(centre[:, None] - centre[None]).sum(-1) + np.eye(len(centre)) * 9
    assert apart.min() > 0.01
    assert np.ptp(centre, axis=0).max() > GRID[1] / 3
