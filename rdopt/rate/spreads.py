"""Rank-1 spreads of a matrix, differentiable: s_ij = rho_i kappa_j, one scale a row and one a column.

Of Gaussian entries with such spreads the likeliest scales are means of what the others leave over,

    rho_i^2 = mean_j x_ij^2 / kappa_j^2,   kappa_j^2 = mean_i x_ij^2 / rho_i^2,

each the other's fixed point; the encoder iterates them in float64 (`rdopt.codec.tables.classes`), here one round, with
floors that gradients pass smoothly, is enough.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_TINY = 1e-8  # of a squared index: keeps the logarithm of an empty row finite
_SMALLEST = 1e-18  # unit of an all-zero matrix, and its mean square in that unit
_RELATIVE = 1e-12  # smallest mean square of a row or column against that of the matrix


def rank1_power(codes: Float[Array, "out in"]) -> Float[Array, "out in"]:
    """rho_i^2 kappa_j^2 of a matrix in steps after one round of the fixed point, from the mean squares of columns."""
    power = jnp.square(codes)
    kappa2 = jnp.mean(power, axis=0) + _TINY
    rho2 = jnp.mean(power / kappa2, axis=1) + _TINY
    kappa2 = jnp.mean(power / rho2[:, None], axis=0) + _TINY
    return rho2[:, None] * kappa2


def marginal_spreads(W: Float[Array, "out in"]) -> tuple[Float[Array, " out"], Float[Array, " in"]]:
    """(rho, kappa) with rho_i^2 kappa_j^2 = mean_j W_ij^2 mean_i W_ij^2 / mean W^2, whose mean square is that of W."""
    # Any constant unit gives the same spreads and gradients; this one keeps squares inside float32.
    peak = jnp.max(jnp.abs(W), axis=(-2, -1), keepdims=True)
    unit = jax.lax.stop_gradient(jnp.maximum(peak, _SMALLEST))
    square = jnp.square(W / unit)
    mean = jnp.mean(square, axis=(-2, -1), keepdims=True)[..., 0] + _SMALLEST
    rho = jnp.sqrt(jnp.maximum(jnp.mean(square, axis=-1) / mean, _RELATIVE))
    kappa = jnp.sqrt(jnp.maximum(jnp.mean(square, axis=-2), mean * _RELATIVE))
    return rho, kappa * unit[..., 0]
