"""Inverses of batches of matrices in JAX, by LU factorisation.

On CPUs one matrix comes after the other: two batched factorisations that XLA runs at once each wait for threads of the
pool that the other one holds, and on a machine of two cores that is for ever.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rdopt.transforms.arrays import matmul

Batch = Float[Array, "*batch n n"]


@jax.custom_vjp
def inverse(A: Batch) -> Batch:
    """A^-1 of invertible matrices; the gradient takes two products."""
    if A.size == 0:
        return A
    return _inverses(A.reshape(-1, *A.shape[-2:])).reshape(A.shape)


@jax.jit
def _inverses(A: Float[Array, "k n n"]) -> Float[Array, "k n n"]:
    return jax.lax.platform_dependent(A, cpu=_one_by_one, default=_by_factors)


def _one_by_one(A: Float[Array, "k n n"]) -> Float[Array, "k n n"]:
    return jax.lax.map(_by_factors, A)


def _by_factors(A: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    factors, _, order = jax.lax.linalg.lu(A)
    permuted = (order[..., :, None] == jnp.arange(A.shape[-1])).astype(A.dtype)
    half = jax.lax.linalg.triangular_solve(factors, permuted, left_side=True, lower=True, unit_diagonal=True)
    return jax.lax.linalg.triangular_solve(factors, half, left_side=True)


def _forward(A: Batch) -> tuple[Batch, Batch]:
    found = inverse(A)
    return found, found


def _backward(found: Batch, X: Batch) -> tuple[Batch]:
    """d(A^-1) = -A^-1 dA A^-1, so that a cotangent X of A^-1 is -A^-T X A^-T of A."""
    transposed = found.swapaxes(-1, -2)
    return (-matmul(matmul(transposed, X), transposed),)


inverse.defvjp(_forward, _backward)
