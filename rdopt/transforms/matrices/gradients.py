"""Inverses, Cayley transforms and Givens layers in JAX, with gradients made of a few products.

The modules of these matrices call this one for arrays of JAX. On CPUs one inverse comes after the other: two batched
factorisations that XLA runs at once each wait for threads of the pool that the other one holds, and on a machine of two
cores that is for ever.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rdopt.transforms.arrays import eye_like, matmul
from rdopt.transforms.matrices.cayley import skew, upper
from rdopt.transforms.matrices.givens import PairLayer, split_layer, turn

Batch = Float[Array, "*batch n n"]


@jax.custom_vjp
def inverse(A: Batch) -> Batch:
    """A^-1 of invertible matrices; the gradient takes two products."""
    if A.size == 0:
        return A
    return _inverses(A.reshape(-1, *A.shape[-2:])).reshape(A.shape)


@jax.jit
def _inverses(A: Float[Array, "k n n"]) -> Float[Array, "k n n"]:
    return jax.lax.platform_dependent(A, cpu=lambda A: jax.lax.map(_by_factors, A), default=_by_factors)


def _by_factors(A: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    factors, _, order = jax.lax.linalg.lu(A)
    permuted = (order[..., :, None] == jnp.arange(A.shape[-1])).astype(A.dtype)
    half = jax.lax.linalg.triangular_solve(factors, permuted, left_side=True, lower=True, unit_diagonal=True)
    return jax.lax.linalg.triangular_solve(factors, half, left_side=True)


def _inverse_forward(A: Batch) -> tuple[Batch, Batch]:
    B = inverse(A)
    return B, B


def _inverse_backward(B: Batch, X: Batch) -> tuple[Batch]:
    """d(A^-1) = -A^-1 dA A^-1, so that a cotangent X of A^-1 is -A^-T X A^-T of A."""
    transposed = B.swapaxes(-1, -2)
    return (-matmul(matmul(transposed, X), transposed),)


inverse.defvjp(_inverse_forward, _inverse_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def trained_cayley(theta: Float[Array, "*batch m"], n: int) -> Batch:
    """`cayley` by one factorisation for the transform and its gradient."""
    return _cayley_forward(theta, n)[0]


def _cayley_forward(theta: Float[Array, "*batch m"], n: int) -> tuple[Batch, Batch]:
    """Q = 2 A - I and A = (I + S)^-1; A is all that the gradient needs."""
    eye = eye_like(theta, theta.shape[:-1], n)
    A = inverse(eye + skew(theta, n))
    return 2 * A - eye, A


def _cayley_backward(n: int, A: Batch, X: Batch) -> tuple[Float[Array, "*batch m"]]:
    """dQ = -2 A dS A, so that a cotangent X of Q is -2 A^T X A^T of S; entry (i, j) of theta is S_ij and -S_ji."""
    transposed = A.swapaxes(-1, -2)
    dS = -2 * matmul(matmul(transposed, X), transposed)
    return (upper(dS - dS.swapaxes(-1, -2)),)


trained_cayley.defvjp(_cayley_forward, _cayley_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def trained_turn(
    z: Float[Array, "*batch n rows"], angles: Float[Array, "*batch p"], layers: list[PairLayer]
) -> Float[Array, "*batch n rows"]:
    """`givens.turn`, of which no layer is kept for the gradient."""
    return turn(z, angles, layers)


def _turn_forward(z: Array, angles: Array, layers: list[PairLayer]) -> tuple[Array, tuple[Array, Array]]:
    y = turn(z, angles, layers)
    return y, (y, angles)


def _turn_backward(
    layers: list[PairLayer], saved: tuple[Array, Array], g: Float[Array, "*batch n rows"]
) -> tuple[Array, Array]:
    """The result is turned back beside its cotangent, so that no layer is kept and no gradient scatters.

    With y_i = c x_i - s x_j and y_j = s x_i + c x_j the derivative of an angle is sum_rows g_j y_i - g_i y_j.
    """
    y, angles = saved
    cos, sin = jnp.cos(angles)[..., None], jnp.sin(angles)[..., None]
    both, order = jnp.stack([y, g]), np.arange(y.shape[-2])
    slopes = jnp.zeros_like(angles)
    for layer in reversed(layers):
        i, j, alone = split_layer(both, order, layer)
        slopes = slopes.at[..., layer.angles].set(jnp.sum(j[1] * i[0] - i[1] * j[0], axis=-1))
        c, s = cos[None, ..., layer.angles, :], sin[None, ..., layer.angles, :]
        both = jnp.concatenate([c * i + s * j, c * j - s * i, alone], axis=-2)
        order = layer.order
    return jnp.take(both[1], np.argsort(order), axis=-2, mode="clip"), slopes


trained_turn.defvjp(_turn_forward, _turn_backward)
