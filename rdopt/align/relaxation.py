"""What the hard encoder would do to one matrix, as smooth functions of its coordinates.

In units of the step a_ij = c / (M_ii L_jj) the indices have variance t_ij = rho_i^2 kappa_j^2 plus the noise that
feedback carries into an entry from those quantized before it. Rate and distortion follow from the operational curves
of entropy-coded quantization (`rdopt.rate.operational`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rdopt.align.coordinates import ErrorMetric, Factor
from rdopt.rate.operational import CurveName, unit_curves
from rdopt.rate.spreads import rank1_power

_ROUNDS = 2


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


def fed_back_power(
    power: Float[Array, "out in"], rows: ErrorMetric, cols: ErrorMetric, curve: CurveName
) -> Float[Array, "out in"]:
    """`power` plus the variance, in squared steps, that feedback adds to every coordinate.

    With G = M M^T and sigma = L L^T the error of an entry (i', j') moves the target of (i, j), i' >= i and j' >= j, by
    M_i'i L_j'j / (M_ii L_jj) of itself, which in the steps of both is (M_i'i / M_i'i') (L_j'j / L_j'j').

    Args:
        power: variance of the coordinates before feedback, in squared steps.
        rows: of the outputs.
        cols: of the inputs.
        curve: what an entry of some spread costs.
    """
    if rows.factor is None and cols.factor is None:
        return power
    total = power
    for _ in range(_ROUNDS):  # the errors that are fed back depend on what was fed back into them
        error = total * unit_curves(-0.5 * jnp.log2(total), curve).distortion
        carried = error if cols.factor is None else _product(error, _shares(cols.factor.L))
        carried = carried if rows.factor is None else _product(_shares(rows.factor.L).T, carried)
        total = power + jnp.maximum(carried - error, 0.0)
    return total


def _shares(L: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """(L_ij / L_ii)^2."""
    return jnp.square(L / jnp.diagonal(L)[:, None])


def _product(a: Float[Array, "m n"], b: Float[Array, "n k"]) -> Float[Array, "m k"]:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def relax(
    W: Float[Array, "out in"], rows: ErrorMetric, cols: ErrorMetric, c: Float[Array, ""], curve: CurveName
) -> Relaxed:
    """Models the encoder on one matrix.

    Args:
        W: weights in trial coordinates.
        rows: how errors count over the outputs there.
        cols: and over the inputs.
        c: base step.
        curve: what an entry of some spread costs.
    """
    codes = W * (rows.weights[:, None] * cols.weights / c)
    variance = fed_back_power(rank1_power(codes), rows, cols, curve)
    curves = unit_curves(-0.5 * jnp.log2(variance), curve)
    return Relaxed(codes, curves.rate, variance * curves.distortion)


def analytic_distortion(relaxed: Relaxed, c: Float[Array, ""]) -> Float[Array, ""]:
    """1/2 sum_ij (M_ii L_jj a_ij)^2 error_ij = c^2 / 2 sum_ij error_ij, nats/token."""
    return 0.5 * c**2 * jnp.sum(relaxed.error)


def unit_noise(key: Array, relaxed: Relaxed, kind: str, hardness: Any = 0.0) -> Float[Array, "out in"]:
    """Quantization errors in steps: uniform noise, with kind "ste" the real rounding residual, "annealed" a blend.

    The noise has the modelled variance, which falls below 1/12 where the step exceeds the spread; gradients
    pass through that variance. The rounding residual is a constant to the gradient (straight-through).
    """
    residual = jax.lax.stop_gradient(jnp.round(relaxed.codes) - relaxed.codes)
    if kind == "ste":
        return residual
    u = jax.random.uniform(key, relaxed.codes.shape, minval=-0.5, maxval=0.5)
    noise = u * jnp.sqrt(12.0 * relaxed.error)
    return noise if kind != "annealed" else (1 - hardness) * noise + hardness * residual


def weight_error(
    noise: Float[Array, "out in"], rows: ErrorMetric, cols: ErrorMetric, c: Float[Array, ""]
) -> Float[Array, "out in"]:
    """The weight error E that noise in steps makes: M^T E L = c noise, with the weights for a side without factor."""
    error = c * noise
    error = error / cols.weights if cols.factor is None else _undone(cols.factor, error.T).T
    return error / rows.weights[:, None] if rows.factor is None else _undone(rows.factor, error)


def _undone(factor: Factor, x: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """L^-T x."""
    if factor.inverse is None:
        return jax.scipy.linalg.solve_triangular(factor.L, x, trans="T", lower=True)
    return _product(factor.inverse.T, x)
