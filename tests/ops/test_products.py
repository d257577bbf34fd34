"""The product of activations and a kernel, and its gradients, beside numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.ops.products import dense


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "product"),
    [
        ((2, 3), (4,), (5,), "abi,ij->abj"),
        ((2, 3), (4,), (5, 6), "abi,ijk->abjk"),
        ((2, 3), (4, 5), (6,), "abij,ijk->abk"),
        ((2, 3, 7), (4,), (5,), "abci,ij->abcj"),
        ((3,), (4,), (5,), "ai,ij->aj"),
    ],
)
def test_dense(rows: tuple[int, ...], inputs: tuple[int, ...], outputs: tuple[int, ...], product: str) -> None:
    rng = np.random.default_rng(0)
    x, kernel, direction = (
        rng.standard_normal(shape).astype(np.float32) for shape in (rows + inputs, inputs + outputs, rows + outputs)
    )
    out, gradients = jax.vjp(lambda x, kernel: dense(x, kernel, len(inputs)), x, kernel)
    to_x, to_kernel = gradients(direction)
    (of_x, of_kernel), of_out = product.split("->")[0].split(","), product.split("->")[1]
    np.testing.assert_allclose(out, np.einsum(product, x, kernel), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        to_x, np.einsum(f"{of_out},{of_kernel}->{of_x}", direction, kernel), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        to_kernel, np.einsum(f"{of_x},{of_out}->{of_kernel}", x, direction), rtol=1e-5, atol=1e-5
    )


def test_gradient_of_the_kernel_contracts_one_axis() -> None:
    x, kernel = jnp.ones((2, 3, 4)), jnp.ones((4, 5, 6))
    program = jax.make_jaxpr(jax.grad(lambda kernel: dense(x, kernel).sum()))(kernel)
    products = [eqn.params["dimension_numbers"] for eqn in program.eqns if eqn.primitive.name == "dot_general"]
    assert products
    assert all(len(left) == len(right) == 1 for (left, right), _ in products)
