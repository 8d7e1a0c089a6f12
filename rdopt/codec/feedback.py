"""Feedback quantization: successive interference cancellation in GPTQ order.

With S = L L^T, |E L|^2 is the output error of a weight error E. Columns are quantized from the last to the
first, and each passes the error it makes to the columns before it through L (GPTQ, 2210.17323; LDLQ, QuIP;
the step per column a_j = c / L_jj makes every column's error weigh the same: WaterSIC).
"""

import numpy as np
from jaxtyping import Float, Int

from rdopt.codec.grids import round_dead_zone

BLOCK = 64


def quantize_rounding(
    W: Float[np.ndarray, "out in"],
    row: Float[np.ndarray, " out"],
    col: Float[np.ndarray, " in"],
    dead_zone: float = 0.0,
) -> Int[np.ndarray, "out in"]:
    """Rounds W to the grid of steps row_i col_j, entry by entry; int32 indices."""
    return round_dead_zone(np.asarray(W, np.float64) / np.outer(row, col), dead_zone)


def quantize_feedback(
    W: Float[np.ndarray, "out in"],
    L: Float[np.ndarray, "in in"],
    row: Float[np.ndarray, " out"],
    col: Float[np.ndarray, " in"],
    dead_zone: float = 0.0,
) -> Int[np.ndarray, "out in"]:
    """Quantizes W on the grid of steps row_i col_j with error feedback over the columns.

    Minimises |(W - row z col) L|^2 greedily: Y = W L / row; for j from the last column to the first,
    z_j = Q(Y_j / (L_jj col_j)) and Y <- Y - col_j z_j L_j,:. Updates are lazy: inside a block of columns at
    once, to the left of it as one matrix product.

    Args:
        W: weights.
        L: lower Cholesky factor of the damped second moments of the input.
        row: positive step factor of each row.
        col: positive step factor of each column.
        dead_zone: extra half-width of the zero bin, in steps.

    Returns:
        int32 indices z with W ~ row_i z_ij col_j. Computed in float64.
    """
    Y = (np.asarray(W, np.float64) / np.asarray(row, np.float64)[:, None]) @ L
    M = np.asarray(col, np.float64)[:, None] * L
    pivot = np.diagonal(M)
    z = np.zeros(W.shape, np.int32)
    for high in range(W.shape[1], 0, -BLOCK):
        low = max(high - BLOCK, 0)
        for j in range(high - 1, low - 1, -1):
            z[:, j] = round_dead_zone(Y[:, j] / pivot[j], dead_zone)
            Y[:, low:j] -= np.outer(z[:, j], M[j, low:j])
        Y[:, :low] -= z[:, low:high] @ M[low:high, :low]
    return z
