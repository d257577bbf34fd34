"""What every row of the catalog keeps, a new one included: nothing here names a method."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.compress import catalog
from vlm_jax.core.axes import KERNEL_AXES
from vlm_jax.core.specs import DecoderSpec, EncoderSpec
from vlm_jax.core.structs import Evidence

B, E, A, D, GRID = 2, 16, 2, 12, (6, 8)  # a wide grid, so that rows taken for columns show
PATCHES = GRID[0] * GRID[1]
QUESTION = 5  # tokens, of which the second example has two less
ENCODER = EncoderSpec("test", 32, 8, E, 3, 2, 24)
DECODER = DecoderSpec("test", D, 2, 3, 3, 4, 24, 32)
SIXTEEN_BIT_TOLERANCE = 0.1  # of the largest output

every_row = pytest.mark.parametrize("name", catalog.ROWS)


def _spec(name, tokens=None, taps=A, **changes):
    method = catalog.row(name)
    possible = method.tokens_out(GRID)
    tokens = min(possible, key=lambda v: abs(v - 12)) if tokens is None else tokens  # 3 x 4 where the method can
    sizes = {
        "grid": GRID,
        "encoder_width": E,
        "text_width": D,
        "key_width": E // 2,
        "width": 24,
        "heads": 4,
        "depth": 1,
        "mlp_width": 20,
    }
    spec = dataclasses.replace(method.defaults(ENCODER, DECODER, tokens), taps=taps, **(sizes | changes))
    catalog.check(spec)
    return spec


def _some_counts(name):
    """All token counts that a method gives on the grid, or about eight of them with both ends."""
    possible = catalog.row(name).tokens_out(GRID)
    return sorted({*possible[:: max(1, len(possible) // 8)], possible[-1]})


def _evidence(seed=0, dtype=jnp.float32, masked=True, taps=A):
    """Everything that a row might read, but the projector."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    tokens, layers = normal(B, PATCHES, E), normal(B, taps, PATCHES, E) if taps else None
    mask = jnp.asarray(rng.random((B, PATCHES)) < 0.7) if masked else None
    return Evidence(
        tokens, mask, layers, keys=normal(B, PATCHES, 2, E // 2),
        salience=jnp.asarray(rng.dirichlet(np.ones(PATCHES), B), jnp.float32), class_token=normal(B, E),
        question_vector=jnp.asarray(rng.normal(size=(B, D)), jnp.float32),
        question_tokens=normal(B, QUESTION, D),
        question_mask=jnp.arange(QUESTION) < jnp.array([[QUESTION], [QUESTION - 2]]),
    )  # fmt: skip


def _named(name, evidence):
    """The fields that the row reads, and the mask."""
    reads = {"tokens", "mask", *catalog.row(name).reads}
    reads |= {"question_mask"} if "question_tokens" in reads else set()
    return Evidence(**{field: getattr(evidence, field) for field in reads - {"project"}})


def _shapes(spec):
    return jax.eval_shape(lambda key: catalog.row(spec.name).init_weights(key, spec), jax.random.key(0))


def _weights(spec):
    """Random values everywhere, so that no bias is zero and no scale one."""
    rng = np.random.default_rng(1)
    fill = lambda box: jnp.asarray(rng.normal(size=box.shape, scale=0.3), box.dtype)  # noqa: E731
    return jax.tree.map(fill, nn.meta.unbox(_shapes(spec)))


def _run(weights, evidence, spec):
    """`apply`, with a linear projector for the rows that call one."""
    method = catalog.row(spec.name)
    if method.projects:
        kernel = np.random.default_rng(7).normal(size=(method.output_width(spec), spec.text_width)) / E**0.5
        evidence = evidence._replace(project=lambda x: x @ jnp.asarray(kernel, x.dtype))
    return method.apply(weights, evidence, spec)


@functools.cache
def _apply(spec):
    return jax.jit(lambda weights, evidence: _run(weights, evidence, spec))


def _outputs(out):
    """What the decoder gets: the tokens, and behind them the question where it is replaced."""
    return out.tokens if out.question is None else jnp.concatenate([out.tokens, out.question], axis=1)


def _is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


@functools.cache
def _pull_back(spec):
    """(weights, evidence, d loss / d output tokens) -> gradients of the weights and of the evidence."""

    def gradients(weights, evidence, seed):
        floats = {f: x for f, x in evidence._asdict().items() if x is not None and _is_float(x)}

        def run(weights, floats):
            return _outputs(_run(weights, evidence._replace(**floats), spec))

        return jax.vjp(run, weights, floats)[1](seed)

    return jax.jit(gradients)


def _width(spec):
    method = catalog.row(spec.name)
    return spec.text_width if method.projects else method.output_width(spec)


def _seed(spec):
    """What arrives from above: random, so that no symmetry cancels it."""
    replaced = QUESTION if {"question_tokens", "project"} <= catalog.row(spec.name).reads else 0
    size = (B, catalog.entering(spec) + replaced, _width(spec))
    return jnp.asarray(np.random.default_rng(9).normal(size=size), jnp.float32)


@every_row
@pytest.mark.parametrize("grid", [(1, 1), GRID, (8, 8), (14, 14), (24, 24)])
def test_possible_token_counts_ascend_and_fit_the_grid(name, grid):
    possible = catalog.row(name).tokens_out(grid)
    assert possible or grid == (1, 1)
    assert list(possible) == sorted(set(possible))
    assert not possible or possible[0] >= 0
    assert not possible or possible[-1] <= grid[0] * grid[1]


@every_row
@pytest.mark.parametrize(("dtype", "taps", "masked"), [(jnp.float32, 0, False), (jnp.bfloat16, A, True)])
def test_every_possible_token_count_comes_out_in_the_dtype_of_the_tokens(name, dtype, taps, masked):
    for tokens in _some_counts(name):
        spec = _spec(name, tokens, taps)
        evidence = _named(name, _evidence(dtype=dtype, masked=masked, taps=taps))
        out = jax.eval_shape(_apply(spec), nn.meta.unbox(_shapes(spec)), evidence)
        entering = catalog.entering(spec)
        assert out.tokens.shape == (B, entering, _width(spec))
        assert out.tokens.dtype == dtype
        assert (out.mask is None) == (not masked)
        assert not masked or (out.mask.shape == (B, entering) and out.mask.dtype == bool)
        assert catalog.row(name).segments(spec) == () or len(catalog.row(name).segments(spec)) == entering


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
    spec, evidence = _spec(name), _named(name, _evidence())
    weights = _weights(spec)
    whole = _apply(spec)(weights, evidence)
    singles = jax.tree.map(lambda x: x[:, None], evidence)
    mapped = jax.jit(jax.vmap(lambda one: _run(weights, one, spec)))(singles)
    np.testing.assert_allclose(mapped.tokens[:, 0], whole.tokens, atol=1e-5)
    assert (mapped.mask[:, 0] == whole.mask).all()


@every_row
def test_sixteen_bits_lose_rounding_only(name):
    """Of the same values: rounded ones could be ranked in another order."""
    spec = _spec(name)
    weights, apply, half = _weights(spec), _apply(spec), _named(name, _evidence(dtype=jnp.bfloat16))
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32) if _is_float(x) else x, half)
    full, half = (apply(weights, evidence).tokens for evidence in (rounded, half))
    largest = float(jnp.abs(full).max(initial=0.0))
    np.testing.assert_allclose(half.astype(jnp.float32), full, atol=SIXTEEN_BIT_TOLERANCE * largest)


@every_row
def test_all_is_finite_even_without_a_single_real_patch(name):
    spec, evidence = _spec(name), _named(name, _evidence())
    evidence = evidence._replace(mask=evidence.mask.at[1].set(False))
    weights = _weights(spec)
    out = _apply(spec)(weights, evidence)
    assert not out.mask[1].any()
    assert jnp.isfinite(out.tokens).all()
    for gradient in jax.tree.leaves(_pull_back(spec)(weights, evidence, _seed(spec))):
        assert jnp.isfinite(gradient).all()


@every_row
def test_an_example_depends_on_itself_alone(name):
    spec = _spec(name)
    first = _seed(spec).at[1].set(0.0)
    _, gradients = _pull_back(spec)(_weights(spec), _named(name, _evidence()), first)
    for gradient in gradients.values():
        assert not gradient[1].any()


@every_row
def test_masked_patches_have_no_influence_on_real_tokens(name):
    spec, evidence = _spec(name), _named(name, _evidence())
    weights = _weights(spec)
    before = _apply(spec)(weights, evidence)
    assert before.mask.any() or not spec.tokens
    other, hidden = _named(name, _evidence(seed=5)), ~evidence.mask
    replaced = {
        field: jnp.where(hidden.reshape(*hidden.shape, *(1,) * (x.ndim - 2)), getattr(other, field), x)
        for field, x in evidence._asdict().items()
        if field in ("tokens", "keys", "salience") and x is not None
    }
    if evidence.taps is not None:
        replaced["taps"] = jnp.where(hidden[:, None, :, None], other.taps, evidence.taps)
    after = _apply(spec)(weights, evidence._replace(**replaced))
    assert (after.mask == before.mask).all()
    shown = lambda out: jnp.where(out.mask[..., None], out.tokens, 0.0)  # noqa: E731
    np.testing.assert_allclose(shown(after), shown(before), atol=1e-5)


@every_row
def test_a_mask_that_hides_nothing_changes_nothing(name):
    spec, evidence = _spec(name), _named(name, _evidence(masked=False))
    weights, apply = _weights(spec), _apply(spec)
    without = apply(weights, evidence)
    within = apply(weights, evidence._replace(mask=jnp.ones((B, PATCHES), bool)))
    np.testing.assert_allclose(within.tokens, without.tokens, atol=1e-5)
    assert within.mask.all()


@every_row
def test_every_field_that_a_row_reads_matters(name):
    """By a gradient, or because what is drawn anew gives other tokens. What it does not read it does not get."""
    spec, evidence, other = _spec(name), _named(name, _evidence(masked=False)), _evidence(seed=5)
    if not spec.tokens:
        return
    weights = _weights(spec)
    _, gradients = _pull_back(spec)(weights, evidence, _seed(spec))
    before = _outputs(_apply(spec)(weights, evidence))
    for field in catalog.row(name).reads - {"project"}:
        moved = _outputs(_apply(spec)(weights, evidence._replace(**{field: getattr(other, field)})))
        assert jnp.abs(moved - before).max() > 1e-4, field
        selects = not gradients[field].any()
        assert not selects or field in ("keys", "salience"), field


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
    patches, floats = spec.grid[0] * spec.grid[1], lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    evidence = Evidence(
        floats(1, patches, spec.encoder_width),
        taps=floats(1, spec.taps, patches, spec.encoder_width) if spec.taps else None,
        keys=floats(1, patches, 2, spec.encoder_width // 2),
        salience=floats(1, patches),
        class_token=floats(1, spec.encoder_width),
        question_vector=floats(1, spec.text_width),
        question_tokens=floats(1, QUESTION, spec.text_width),
        question_mask=jax.ShapeDtypeStruct((1, QUESTION), bool),
    )
    return nn.meta.unbox(_shapes(spec)), _named(spec.name, evidence)


def _flops(spec):
    method = catalog.row(spec.name)
    cost = method.cost(spec, QUESTION)
    projector = 2 * (cost.projected or 0) * method.output_width(spec) * spec.text_width
    return cost.image + cost.question + (projector if method.projects else 0)


@every_row
@pytest.mark.parametrize("taps", [0, A])
def test_flops_are_the_products_of_the_traced_program(name, taps):
    for tokens in _some_counts(name):
        spec = _spec(name, tokens, taps)
        traced = jax.make_jaxpr(_apply(spec))(*_one_image(spec))
        assert _flops(spec) == _product_flops(traced.jaxpr), f"tokens={tokens}"


@every_row
def test_the_cost_of_an_image_does_not_depend_on_the_question(name):
    spec = _spec(name)
    short, long = (catalog.row(name).cost(spec, tokens) for tokens in (3, 30))
    assert short.image == long.image
    assert catalog.row(name).query_dependent or short.question == long.question == 0


@pytest.mark.parametrize("name", [name for name in catalog.ROWS if jax.tree.leaves(_shapes(_spec(name)))])
def test_flops_are_what_the_compiler_counts(name):
    """At a width where elementwise work is a small part of the whole."""
    spec = _spec(name, grid=GRID, encoder_width=256, width=384, mlp_width=512, text_width=132)
    program = _apply(spec).lower(*_one_image(spec))
    if not _flops(spec) or "convolution" in program.as_text():  # XLA leaves out products with padding
        return
    compiled = program.compile()
    np.testing.assert_allclose(_flops(spec), compiled.cost_analysis().get("flops", 0.0), rtol=0.05)
