"""One block in trial coordinates: its weights and moments turned by the gauges, in JAX, float32.

The block's norm gains are folded into its consumers beforehand, so the gauges are orthogonal matrices A and B:
W' = A W B, sigma' = B^T sigma B, G' = A G A^T.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rdopt.align.cholesky import cholesky_and_inverse
from rdopt.calibration.moments import INPUT_OF
from rdopt.checkpoint import Architecture

_EXACT = jax.lax.Precision.HIGHEST


class Rotations(NamedTuple):
    """R of the residual stream (d, d) and V of the value heads (kv_heads, h, h) of one block."""

    R: Float[Array, "d d"]
    V: Float[Array, "kv h h"]


def left_right(name: str, rotations: Rotations, arch: Architecture) -> tuple[Array | None, Array | None]:
    """(A, B) of one matrix: W' = A W B; None is the identity."""
    R, V = rotations
    if name in ("q", "k", "gate", "up"):
        return None, R
    if name == "v":
        return jax.scipy.linalg.block_diag(*V), R
    if name == "down":
        return R.T, None
    group = arch.num_heads // arch.num_kv_heads
    return R.T, jax.scipy.linalg.block_diag(*jnp.repeat(V, group, axis=0)).T


def _times(*factors: Array | None) -> Array:
    present = [f for f in factors if f is not None]
    out = present[0]
    for f in present[1:]:
        out = jnp.matmul(out, f, precision=_EXACT)
    return out


def _transpose(x: Array | None) -> Array | None:
    return None if x is None else x.T


def turn_weight(W: Float[Array, "out in"], A: Array | None, B: Array | None) -> Float[Array, "out in"]:
    """A W B."""
    return _times(A, W, B)


def turn_back(E: Float[Array, "out in"], A: Array | None, B: Array | None) -> Float[Array, "out in"]:
    """A^T E B^T, the inverse of `turn_weight`."""
    return _times(_transpose(A), E, _transpose(B))


class Factor(NamedTuple):
    """Cholesky factor of a damped input moment, and its inverse."""

    L: Float[Array, "in in"]
    inverse: Float[Array, "in in"]


def turned_factors(
    sigma: Mapping[str, Array], rotations: Rotations, arch: Architecture, damping: float
) -> dict[str, Factor]:
    """Factors of the damped sigma' of each input group; damping is a share of the mean diagonal."""
    factors = {}
    for name in ("q", "o", "gate", "down"):
        group = INPUT_OF[name]
        _, B = left_right(name, rotations, arch)
        turned = _times(_transpose(B), sigma[group], B)
        n = turned.shape[0]
        floor = damping * jnp.trace(turned) / n
        factors[group] = Factor(*cholesky_and_inverse(turned + floor * jnp.eye(n, dtype=turned.dtype)))
    return factors


def turned_diag_G(G: Any, A: Array | None, damping: float) -> Float[Array, " out"]:
    """Diagonal of G' = A G A^T, damped by a share of its mean; a diagonal G is left as it is."""
    if A is not None and G.ndim == 2:
        diag = jnp.sum(jnp.matmul(A, G, precision=_EXACT) * A, axis=1)
    else:
        diag = jnp.diagonal(G) if G.ndim == 2 else G
    return diag + damping * jnp.mean(diag)
