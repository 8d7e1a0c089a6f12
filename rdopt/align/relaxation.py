"""What the hard encoder would do to one matrix, as smooth functions of its coordinates.

In units of the step a_ij = c / (sqrt(G_ii) L_jj) the indices have variance t_ij = rho_i^2 kappa_j^2 plus the noise
that feedback carries into column j from the columns quantized before it. Rate and distortion follow from
the operational curves of entropy-coded quantization (DESIGN section 3).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rdopt.align.coordinates import Factor
from rdopt.rate import Density, unit_curves, unit_distortion

_TINY = 1e-8


class Relaxed(NamedTuple):
    """The relaxed quantization of one matrix.

    Attributes:
        codes: W / a, the real coordinates in steps.
        rate: r, expected bits per entry.
        error: expected squared error per entry, in squared steps.
    """

    codes: Float[Array, "out in"]
    rate: Float[Array, "out in"]
    error: Float[Array, "out in"]


def column_weights(L: Float[Array, "in in"], feedback: bool) -> Float[Array, " in"]:
    """The encoder's column weights: L_jj with feedback, the root of the moment's diagonal without."""
    return jnp.diagonal(L) if feedback else jnp.sqrt(jnp.sum(jnp.square(L), axis=1))


def spread_power(codes: Float[Array, "out in"]) -> Float[Array, "out in"]:
    """rho_i^2 kappa_j^2, the rank-1 fit that the encoder's classes use (one round of it)."""
    power = jnp.square(codes)
    kappa2 = jnp.mean(power, axis=0) + _TINY
    rho2 = jnp.mean(power / kappa2, axis=1) + _TINY
    kappa2 = jnp.mean(power / rho2[:, None], axis=0) + _TINY
    return rho2[:, None] * kappa2


def feedback_noise(
    L: Float[Array, "in in"], power: Float[Array, " in"], density: Density
) -> Float[Array, " in"]:
    """Variance, in squared steps, that feedback adds to each column: sum_{i>j} error_i (L_ij / L_ii)^2.

    Column j receives e_i L_ij / L_jj from every later column i; with steps c / L_jj that is
    (L_ij / L_ii) times the error of column i in its own steps.

    Args:
        L: lower Cholesky factor of the damped input moment.
        power: mean of the squared coordinates of each column, in steps.
        density: marginal density, for the error of a column.
    """
    error = power * unit_distortion(-0.5 * jnp.log2(power), density)
    ratio = jnp.tril(L, -1) / jnp.diagonal(L)[:, None]
    return error @ jnp.square(ratio)


def relax(
    W: Float[Array, "out in"],
    L: Float[Array, "in in"],
    g: Float[Array, " out"],
    c: Float[Array, ""],
    feedback: bool,
    density: Density,
) -> Relaxed:
    """Models the encoder on one matrix.

    Args:
        W: weights in trial coordinates.
        L: Cholesky factor of the damped input moment there.
        g: damped output sensitivities of the rows.
        c: base step.
        feedback: whether errors are fed back (the encoder's "feedback" grid).
        density: marginal density of the indices.
    """
    codes = W * jnp.sqrt(g)[:, None] * column_weights(L, feedback) / c
    variance = spread_power(codes)
    if feedback:
        variance = variance + feedback_noise(L, jnp.mean(variance, axis=0), density)
    curves = unit_curves(-0.5 * jnp.log2(variance), density)
    return Relaxed(codes, curves.rate, variance * curves.distortion)


def analytic_distortion(relaxed: Relaxed, c: Float[Array, ""]) -> Float[Array, ""]:
    """1/2 sum_ij G_ii L_jj^2 a_ij^2 error_ij = c^2 / 2 sum_ij error_ij, nats/token."""
    return 0.5 * c**2 * jnp.sum(relaxed.error)


def unit_noise(key: Array, relaxed: Relaxed, kind: str) -> Float[Array, "out in"]:
    """Quantization errors in steps: uniform noise, or with kind "ste" the real rounding residual.

    The noise has the modelled variance, which falls below 1/12 where the step exceeds the spread; gradients
    pass through that variance. The rounding residual is a constant to the gradient (straight-through).
    """
    if kind == "ste":
        return jax.lax.stop_gradient(jnp.round(relaxed.codes) - relaxed.codes)
    u = jax.random.uniform(key, relaxed.codes.shape, minval=-0.5, maxval=0.5)
    return u * jnp.sqrt(12.0 * relaxed.error)


def weight_error(
    noise: Float[Array, "out in"], factor: Factor, g: Float[Array, " out"], c: Array, feedback: bool
) -> Float[Array, "out in"]:
    """The weight error that noise in steps makes: E L = c noise / sqrt(g) with feedback, E = a noise without."""
    rows = c * noise / jnp.sqrt(g)[:, None]
    if not feedback:
        return rows / column_weights(factor.L, feedback)
    return jnp.matmul(rows, factor.inverse, precision=jax.lax.Precision.HIGHEST)
