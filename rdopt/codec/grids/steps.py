"""Steps that follow from lambda: a_ij = c / (sqrt(G_ii) L_jj), kept as integer logarithms.

A step is exp2(k / STEPS_PER_OCTAVE) with k an integer, times one float32 base per file, so that a column of a
matrix costs a few entropy-coded bits and every decoder forms the same float32 step.
"""

from functools import lru_cache
from math import isqrt

import numpy as np
from jaxtyping import Float, Int

from rdopt.config.errors import UserError

STEPS_PER_OCTAVE = 4
_MANTISSA_BITS = 23
_SINGULAR = (
    "some directions of the second moments are empty and encode.damping is {:g}; "
    "raise it (0.02 is usual) or calibrate on more text."
)


def log_steps(scale: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Nearest integers k with exp2(k / STEPS_PER_OCTAVE) close to the positive scales."""
    return np.rint(STEPS_PER_OCTAVE * np.log2(scale)).astype(np.int32)


def exp_steps(k: Int[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """exp2(k / STEPS_PER_OCTAVE) in float32, the same bits on every machine."""
    return exact_exp2(k, STEPS_PER_OCTAVE)


def exact_exp2(k: Int[np.ndarray, "*shape"], precision: int) -> Float[np.ndarray, "*shape"]:
    """exp2(k / precision) in float32, from integers alone.

    The mantissas come from nested integer square roots, not from a libm, so that the result is the same on every
    machine.

    Args:
        k: integers.
        precision: steps in an octave, a power of two.
    """
    octave, rest = np.divmod(np.asarray(k, np.int32), precision)
    return np.ldexp(_mantissas(precision)[rest], octave - _MANTISSA_BITS).astype(np.float32)


@lru_cache
def _mantissas(precision: int) -> Float[np.ndarray, " precision"]:
    """floor(2^(r / precision) 2^23) for r < precision: one nested square root a doubling of the precision."""
    mantissas = []
    for r in range(precision):
        root = (1 << r) << (precision * _MANTISSA_BITS)
        for _ in range(precision.bit_length() - 1):
            root = isqrt(root)
        mantissas.append(root)
    return np.array(mantissas, np.float32)


def dequantize(
    z: Int[np.ndarray, "out in"], row: Int[np.ndarray, " out"], col: Int[np.ndarray, " in"], c: float
) -> Float[np.ndarray, "out in"]:
    """z_ij (row_i (col_j c)) in float32, products in this order, so that every machine gets the same bits."""
    steps = exp_steps(row)[:, None] * (exp_steps(col) * np.float32(c))[None, :]
    return z.astype(np.float32) * steps


def damped_cholesky(sigma: Float[np.ndarray, "n n"], damping: float) -> Float[np.ndarray, "n n"]:
    """Lower Cholesky factor L of sigma + damping mean(diag sigma) I, float64.

    Damping keeps directions that the calibration text hardly visits from taking unbounded steps.

    Raises:
        UserError: the sum is singular.
    """
    sigma = np.asarray(sigma, np.float64)
    mean = np.trace(sigma) / sigma.shape[0]
    floor = damping * mean if mean > 0 else 1.0
    try:
        return np.linalg.cholesky(sigma + floor * np.eye(sigma.shape[0]))
    except np.linalg.LinAlgError as error:
        raise UserError(_SINGULAR.format(damping)) from error


def damped_weights(g: Float[np.ndarray, " m"], damping: float) -> Float[np.ndarray, " m"]:
    """Row sensitivities diag G damped by a share of their mean; all ones when they vanish.

    Raises:
        UserError: a row has no weight and no damping.
    """
    mean = float(np.mean(g))
    if mean <= 0:
        return np.ones_like(g, dtype=np.float64)
    damped = np.asarray(g, np.float64) + damping * mean
    if damped.min() <= 0:
        raise UserError(_SINGULAR.format(damping))
    return damped
