"""Differentiable stand-ins for the bits of a rounded weight: noise, straight-through, sparsity proxies.

Noise and straight-through read -log2 of a parametric density's mass on the bin (Balle et al. 2017, Theis et
al. 2017); l1 and log are the penalties of the sparsity literature in bits, for comparison. All are bits per
entry.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from rdopt.config.schema import Density
from rdopt.rate.densities import log_bin_mass, lower_bound

LIKELIHOOD_FLOOR = 1e-9  # CompressAI's; an entry never counts more than 30 bits


def bits(
    x: Float[Array, "out in"],
    step: ArrayLike,
    scale: ArrayLike,
    density: Density = "gaussian",
    floor: float = LIKELIHOOD_FLOOR,
) -> Float[Array, "out in"]:
    """-log2 of the mass on the bin around x, the mass floored at ``floor`` with a gradient-passing bound.

    Args:
        x: weights, rounded or with noise.
        step, scale: broadcast to x, e.g. (1, in) for one a column or (out, 1) for one a row.
        density: shape of the density.
        floor: smallest likelihood.
    """
    log_mass = log_bin_mass(x, step, scale, density)
    bounded = lower_bound(log_mass, jnp.full_like(log_mass, math.log(floor)))
    return -bounded / math.log(2)


def add_noise(W: Float[Array, "out in"], step: ArrayLike, key: PRNGKeyArray) -> Float[Array, "out in"]:
    """W plus noise uniform on a bin: its density, the bin mass, interpolates the rounded one smoothly."""
    width = jnp.broadcast_to(jnp.asarray(step, dtype=W.dtype), W.shape)
    return W + width * (jax.random.uniform(key, W.shape, W.dtype) - 0.5)


def round_straight_through(W: Float[Array, "out in"], step: ArrayLike) -> Float[Array, "out in"]:
    """step round(W / step) with the gradient of W; an index beyond float precision leaves its entry alone."""
    width = jax.lax.stop_gradient(jnp.broadcast_to(jnp.asarray(step, dtype=W.dtype), W.shape))
    fixed = jax.lax.stop_gradient(W)
    index = fixed / width
    rounded = jnp.where(jnp.abs(index) < 2.0**23, width * jnp.round(index), fixed)
    return W + (rounded - fixed)


def noise_rate(
    W: Float[Array, "out in"],
    step: ArrayLike,
    scale: ArrayLike,
    key: PRNGKeyArray,
    density: Density = "gaussian",
) -> Float[Array, "out in"]:
    """Bits per entry with uniform noise in place of rounding; unbiased, smooth in W, step and scale."""
    return bits(add_noise(W, step, key), step, scale, density)


def annealed_rate(
    W: Float[Array, "out in"],
    step: ArrayLike,
    scale: ArrayLike,
    key: PRNGKeyArray,
    hardness: ArrayLike,
    density: Density = "gaussian",
) -> Float[Array, "out in"]:
    """Bits per entry with noise that becomes rounding: noise at hardness 0, straight-through rounding at 1."""
    soft, hard = add_noise(W, step, key), round_straight_through(W, step)
    return bits(soft + hardness * (hard - soft), step, scale, density)


def straight_through_rate(
    W: Float[Array, "out in"], step: ArrayLike, scale: ArrayLike, density: Density = "gaussian"
) -> Float[Array, "out in"]:
    """Bits per entry of the rounded weights under the density; gradients pass the rounding."""
    return bits(round_straight_through(W, step), step, scale, density)


def l1_proxy(W: Float[Array, "out in"], step: ArrayLike, scale: ArrayLike) -> Float[Array, "out in"]:
    """An l1 norm in bits: a Laplace density's code length at high rate, log2(2 b / step) + |W| / (b ln2).

    Args:
        W: weights.
        step: of the grid.
        scale: standard deviation, b = scale / sqrt(2); b is at least half a step, which keeps the bits positive.
    """
    width = jnp.broadcast_to(jnp.asarray(step, dtype=W.dtype), W.shape)
    b = jnp.broadcast_to(jnp.asarray(scale, dtype=W.dtype), W.shape) / math.sqrt(2)
    b = lower_bound(b, width / 2)
    return jnp.log2(2 * b) - jnp.log2(width) + jnp.abs(W) / (b * math.log(2))


def log_proxy(W: Float[Array, "out in"], step: ArrayLike) -> Float[Array, "out in"]:
    """log2(1 + |W| / step): the length of the index's magnitude in binary, a log-sum sparsity penalty."""
    width = jnp.broadcast_to(jnp.asarray(step, dtype=W.dtype), W.shape)
    return jnp.log2(width + jnp.abs(W)) - jnp.log2(width)
