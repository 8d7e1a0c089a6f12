"""Analytic rate and distortion of feedback quantization: a smooth proxy that needs no noise and no rounding.

Entry ij of W has step a_ij = a_i a_j and a spread modelled as s_ij = rho_i kappa_j, so that (WaterSIC; GPTQ
order)

    R = sum_ij r(a_ij / s_ij) bits,   D = 1/2 sum_ij G_ii L_jj^2 s_ij^2 d(a_ij / s_ij) nats/token

with r, d the operational curves of the unit density, G the output-gradient and L L^T the input second moment.
Leading axes (layers, heads) are batches. Divide the bits by the number of coded weights of the model, not of
the matrix.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from rdopt.config.schema import Density
from rdopt.rate.operational import unit_curves

_SMALLEST = 1e-18  # unit of an all-zero matrix
_TINY = 1e-18  # mean square of an all-zero matrix in that unit
_RELATIVE = 1e-12  # smallest mean square of a row or column against that of the matrix


class Spreads(NamedTuple):
    """s_ij = row_i col_j, in the units of W; the rows carry none."""

    row: Float[Array, "*batch out"]
    col: Float[Array, "*batch in"]


class Steps(NamedTuple):
    """a_ij = row_i col_j, in the units of W."""

    row: Float[Array, "*batch out"]
    col: Float[Array, "*batch in"]


class RateDistortion(NamedTuple):
    """Bits of a matrix, and its share of the KL in nats/token; one a batch entry."""

    bits: Float[Array, "*batch"]
    distortion: Float[Array, "*batch"]


def spreads(W: Float[Array, "*batch out in"]) -> Spreads:
    """Rank-1 spreads s_ij^2 = mean_j(W_ij^2) mean_i(W_ij^2) / mean(W^2); their mean square is that of W."""
    # any constant unit gives the same spreads and gradients; this one keeps squares inside float32
    peak = jnp.max(jnp.abs(W), axis=(-2, -1), keepdims=True)
    unit = jax.lax.stop_gradient(jnp.maximum(peak, _SMALLEST))
    square = jnp.square(W / unit)
    mean = jnp.mean(square, axis=(-2, -1), keepdims=True)[..., 0] + _TINY
    row = jnp.sqrt(jnp.maximum(jnp.mean(square, axis=-1) / mean, _RELATIVE))
    col = jnp.sqrt(jnp.maximum(jnp.mean(square, axis=-2), mean * _RELATIVE))
    return Spreads(row, col * unit[..., 0])


def feedback_steps(
    c: ArrayLike, gradient_diag: Float[Array, "*batch out"], cholesky_diag: Float[Array, "*batch in"]
) -> Steps:
    """a_ij = c / (sqrt(G_ii) L_jj): every entry of the whitened error then has variance c^2 / 12.

    Args:
        c: one for the model, c^2 = 12 / (N ln2 lambda); see step_constant.
        gradient_diag: G_ii, > 0 (damped), (nats / output unit)^2.
        cholesky_diag: L_jj, > 0, of the damped input second moment.
    """
    return Steps(jnp.asarray(c, gradient_diag.dtype) / jnp.sqrt(gradient_diag), 1 / cholesky_diag)


def step_constant(lam: float, coded_weights: int) -> float:
    """c at the high-rate optimum of bits/N + lam D: c^2 = 12 / (N ln2 lam)."""
    return (12 / (coded_weights * 0.6931471805599453 * lam)) ** 0.5


def log2_ratios(W: Float[Array, "*batch out in"], steps: Steps) -> Float[Array, "*batch out in"]:
    """log2(a_ij / s_ij), a row term plus a column term."""
    spread = spreads(W)
    rows = jnp.log2(steps.row) - jnp.log2(spread.row)
    cols = jnp.log2(steps.col) - jnp.log2(spread.col)
    return rows[..., :, None] + cols[..., None, :]


def analytic_rate(
    W: Float[Array, "*batch out in"], steps: Steps, density: Density = "gaussian"
) -> Float[Array, "*batch"]:
    """Bits of a matrix, R = sum_ij r(a_ij / s_ij)."""
    return jnp.sum(unit_curves(log2_ratios(W, steps), density).rate, axis=(-2, -1))


def analytic_rate_distortion(
    W: Float[Array, "*batch out in"],
    steps: Steps,
    gradient_diag: Float[Array, "*batch out"],
    cholesky_diag: Float[Array, "*batch in"],
    density: Density = "gaussian",
) -> RateDistortion:
    """Bits and D = 1/2 sum_ij G_ii L_jj^2 s_ij^2 d(a_ij / s_ij) of a matrix, both curves in one look-up."""
    curves = unit_curves(log2_ratios(W, steps), density)
    spread = spreads(W)
    rows = gradient_diag * spread.row**2
    cols = (cholesky_diag * spread.col) ** 2
    weighted = rows[..., :, None] * cols[..., None, :] * curves.distortion
    return RateDistortion(jnp.sum(curves.rate, axis=(-2, -1)), jnp.sum(weighted, axis=(-2, -1)) / 2)


def analytic_distortion(
    W: Float[Array, "*batch out in"],
    steps: Steps,
    gradient_diag: Float[Array, "*batch out"],
    cholesky_diag: Float[Array, "*batch in"],
    density: Density = "gaussian",
) -> Float[Array, "*batch"]:
    """D alone, in nats/token."""
    return analytic_rate_distortion(W, steps, gradient_diag, cholesky_diag, density).distortion
