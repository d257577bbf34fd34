"""What every row of the catalog keeps, a new one included: nothing here names a method."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.compress import catalog
from vlm_jax.core.axes import KERNEL_AXES
from vlm_jax.core.specs import CompressorSpec
from vlm_jax.core.structs import Visual

B, E, A, D, GRID = 2, 16, 2, 12, (4, 6)  # a wide grid, so that rows taken for columns show
PATCHES = GRID[0] * GRID[1]
SIXTEEN_BIT_TOLERANCE = 0.1  # of the largest output

every_row = pytest.mark.parametrize("name", catalog.ROWS)


def _spec(name, tokens=None, taps=A, **changes):
    possible = catalog.row(name).tokens_out(GRID)
    nearest = min(possible, key=lambda v: abs(v - 6))  # 2 x 3 where the method can
    sizes = {"grid": GRID, "encoder_width": E, "text_width": D, "width": 24, "heads": 4, "depth": 1, "mlp_width": 20}
    spec = CompressorSpec(name=name, tokens=nearest if tokens is None else tokens, taps=taps, **(sizes | changes))
    catalog.check(spec)
    return spec


def _some_counts(name):
    """All token counts that a method gives on the grid, or about eight of them with both ends."""
    possible = catalog.row(name).tokens_out(GRID)
    return sorted({*possible[:: max(1, len(possible) // 8)], possible[-1]})


def _visual(seed=0, dtype=jnp.float32, masked=True, taps=A):
    rng = np.random.default_rng(seed)
    tokens, layers = rng.normal(size=(B, PATCHES, E)), rng.normal(size=(B, taps, PATCHES, E))
    mask = jnp.asarray(rng.random((B, PATCHES)) < 0.7) if masked else None
    return Visual(jnp.asarray(tokens, dtype), jnp.asarray(layers, dtype) if taps else None, mask)


def _text(seed=3):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, D)), jnp.float32)


def _shapes(spec):
    return jax.eval_shape(lambda key: catalog.row(spec.name).init_weights(key, spec), jax.random.key(0))


def _weights(spec):
    """Random values everywhere, so that no bias is zero and no scale one."""
    rng = np.random.default_rng(1)
    fill = lambda box: jnp.asarray(rng.normal(size=box.shape, scale=0.3), box.dtype)  # noqa: E731
    return jax.tree.map(fill, nn.meta.unbox(_shapes(spec)))


@functools.cache
def _apply(spec):
    return jax.jit(lambda weights, visual, text: catalog.row(spec.name).apply(weights, visual, text, spec))


@functools.cache
def _pull_back(spec):
    """(weights, tokens, taps, mask, text, d loss / d output tokens) -> gradients of the first three and of the text."""

    def gradients(weights, tokens, taps, mask, text, seed):
        def run(weights, tokens, taps, text):
            return catalog.row(spec.name).apply(weights, Visual(tokens, taps, mask), text, spec).tokens

        return jax.vjp(run, weights, tokens, taps, text)[1](seed)

    return jax.jit(gradients)


def _seed(spec):
    """What arrives from above: random, so that no symmetry cancels it."""
    return jnp.asarray(np.random.default_rng(9).normal(size=(B, spec.tokens, E)), jnp.float32)


@every_row
@pytest.mark.parametrize("grid", [(1, 1), GRID, (8, 8), (14, 14), (24, 24)])
def test_possible_token_counts_ascend_and_fit_the_grid(name, grid):
    possible = catalog.row(name).tokens_out(grid)
    assert possible
    assert list(possible) == sorted(set(possible))
    assert possible[0] >= 0
    assert possible[-1] <= grid[0] * grid[1]


@every_row
@pytest.mark.parametrize(("dtype", "taps", "masked"), [(jnp.float32, 0, False), (jnp.bfloat16, A, True)])
def test_every_possible_token_count_comes_out_in_the_dtype_of_the_tokens(name, dtype, taps, masked):
    for tokens in _some_counts(name):
        spec = _spec(name, tokens, taps)
        visual = _visual(dtype=dtype, masked=masked, taps=taps)
        out = jax.eval_shape(_apply(spec), nn.meta.unbox(_shapes(spec)), visual, _text())
        assert out.tokens.shape == (B, tokens, E)
        assert out.tokens.dtype == dtype
        assert out.taps is None
        assert (out.mask is None) == (not masked)
        assert not masked or (out.mask.shape == (B, tokens) and out.mask.dtype == bool)


@every_row
def test_weights_are_boxed_float32_with_known_names(name):
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    for box in jax.tree.leaves(_shapes(_spec(name)), is_leaf=is_box):
        assert is_box(box)
        assert box.value.dtype == jnp.float32
        assert len(box.names) == box.value.ndim == len(set(box.names))
        assert set(box.names) <= set(KERNEL_AXES)


@every_row
def test_vmap_over_single_examples_equals_the_batch(name):
    spec, visual, text = _spec(name), _visual(), _text()
    weights, method = _weights(spec), catalog.row(name)
    whole = _apply(spec)(weights, visual, text)
    singles = jax.tree.map(lambda x: x[:, None], (visual, text))
    mapped = jax.jit(jax.vmap(lambda v, t: method.apply(weights, v, t, spec)))(*singles)
    np.testing.assert_allclose(mapped.tokens[:, 0], whole.tokens, atol=1e-5)
    assert (mapped.mask[:, 0] == whole.mask).all()


@every_row
def test_sixteen_bits_lose_rounding_only(name):
    spec, text = _spec(name), _text()
    weights, apply = _weights(spec), _apply(spec)
    full, half = (apply(weights, _visual(dtype=dtype), text).tokens for dtype in (jnp.float32, jnp.bfloat16))
    largest = float(jnp.abs(full).max(initial=0.0))
    np.testing.assert_allclose(half.astype(jnp.float32), full, atol=SIXTEEN_BIT_TOLERANCE * largest)


@every_row
def test_all_is_finite_even_without_a_single_real_patch(name):
    spec, visual, text = _spec(name), _visual(), _text()
    visual = visual._replace(mask=visual.mask.at[1].set(False))
    weights = _weights(spec)
    out = _apply(spec)(weights, visual, text)
    assert not out.mask[1].any()
    assert jnp.isfinite(out.tokens).all()
    for gradient in jax.tree.leaves(_pull_back(spec)(weights, *visual, text, _seed(spec))):
        assert jnp.isfinite(gradient).all()


@every_row
def test_an_example_depends_on_itself_alone(name):
    spec = _spec(name)
    first = _seed(spec).at[1].set(0.0)
    for gradient in _pull_back(spec)(_weights(spec), *_visual(), _text(), first)[1:]:
        assert not gradient[1].any()


@every_row
def test_masked_patches_have_no_influence_on_real_tokens(name):
    spec, visual, text = _spec(name), _visual(), _text()
    weights = _weights(spec)
    real = _apply(spec)(weights, visual, text).mask
    seed = jnp.where(real[..., None], _seed(spec), 0.0)
    _, tokens, taps, _ = _pull_back(spec)(weights, *visual, text, seed)
    assert real.any() or not spec.tokens
    assert not tokens[~visual.mask].any()
    assert not jnp.swapaxes(taps, 1, 2)[~visual.mask].any()


@every_row
def test_a_mask_that_hides_nothing_changes_nothing(name):
    spec, visual = _spec(name), _visual(masked=False)
    weights, apply = _weights(spec), _apply(spec)
    without = apply(weights, visual, _text())
    within = apply(weights, visual._replace(mask=jnp.ones((B, PATCHES), bool)), _text())
    np.testing.assert_allclose(within.tokens, without.tokens, atol=1e-5)
    assert within.mask.all()


@every_row
def test_reads_the_question_exactly_when_it_says_so(name):
    spec, visual = _spec(name), _visual()
    *_, gradient = _pull_back(spec)(_weights(spec), *visual, _text(), _seed(spec))
    if catalog.row(name).query_dependent:
        assert (jnp.abs(gradient).max(axis=1) > 1e-6).all()
    else:
        assert not gradient.any()
        jax.eval_shape(_apply(spec), _weights(spec), visual, None)


def _product_flops(jaxpr):
    """Twice the multiply-adds of every matrix product and convolution of a program, inner programs included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (left, _), _ = equation.params["dimension_numbers"]
            summed = np.prod([equation.invars[0].aval.shape[axis] for axis in left], dtype=int)
            total += 2 * equation.outvars[0].aval.size * summed
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * equation.outvars[0].aval.size * np.prod(kernel) // kernel[outputs]
        for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                total += _product_flops(inner)
    return int(total)


def _one_image(spec):
    """Shapes of the arguments of `_apply` for one image and its question."""
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    patches = spec.grid[0] * spec.grid[1]
    taps = floats(1, spec.taps, patches, spec.encoder_width) if spec.taps else None
    return (
        nn.meta.unbox(_shapes(spec)),
        Visual(floats(1, patches, spec.encoder_width), taps),
        floats(1, spec.text_width),
    )


@every_row
@pytest.mark.parametrize("taps", [0, A])
def test_flops_are_the_products_of_the_traced_program(name, taps):
    for tokens in _some_counts(name):
        spec = _spec(name, tokens, taps)
        traced = jax.make_jaxpr(_apply(spec))(*_one_image(spec))
        assert catalog.row(name).flops(spec) == _product_flops(traced.jaxpr), f"tokens={tokens}"


@every_row
def test_flops_are_what_the_compiler_counts(name):
    """At a width where elementwise work is a small part of the whole."""
    spec = _spec(name, grid=GRID, encoder_width=256, width=384, mlp_width=512, text_width=128)
    compiled = _apply(spec).lower(*_one_image(spec)).compile()
    np.testing.assert_allclose(catalog.row(name).flops(spec), compiled.cost_analysis().get("flops", 0.0), rtol=0.05)
