"""Feedback quantization: successive interference cancellation in GPTQ order.

With S = L L^T, |E L|^2 is the output error of a weight error E. Columns are quantized from the last to the
first, and each passes the error it makes to the columns before it through L (GPTQ, 2210.17323; LDLQ, QuIP;
the step per column a_j = c / L_jj makes every column's error weigh the same: WaterSIC).
"""

import numpy as np
from jaxtyping import Float, Int

from rdopt.codec.grids.uniform import round_dead_zone
from rdopt.codec.tables.classes import RowsCols, rank1_spreads

BLOCK = 64  # columns whose errors are fed back at once; those behind them by one matrix product


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

    Minimises |(W - row z col) L|^2 greedily: for j from the last column to the first, with E = W / row - z col behind
    it and E = W / row up to it, z_j = Q((E L)_j / (L_jj col_j)). Updates are lazy: inside a block of columns at
    once, from the columns behind it as one matrix product.

    Args:
        W: weights.
        L: lower Cholesky factor of the damped second moments of the input.
        row: positive step factor of each row.
        col: positive step factor of each column.
        dead_zone: extra half-width of the zero bin, in steps.

    Returns:
        int32 indices z with W ~ row_i z_ij col_j. Computed in float64.
    """
    E = np.asarray(W, np.float64).T / np.asarray(row, np.float64)
    M = np.asarray(col, np.float64)[:, None] * L
    z = np.zeros(E.shape, np.int32)
    for high in range(len(E), 0, -BLOCK):
        low = max(high - BLOCK, 0)
        Y = L[low:, low:high].T @ E[low:]
        for j in range(high - 1, low - 1, -1):
            z[j] = round_dead_zone(Y[j - low] / M[j, j], dead_zone)
            Y[: j - low] -= np.outer(M[j, low:j], z[j])
        E[low:high] -= col[low:high, None] * z[low:high]
    return np.ascontiguousarray(z.T)


def coordinate_spreads(
    z: Int[np.ndarray, "out in"],
    error: Float[np.ndarray, "out in"],
    L: Float[np.ndarray, "in in"],
    row: Float[np.ndarray, " out"],
    col: Float[np.ndarray, " in"],
) -> RowsCols:
    """`rank1_spreads` of the coordinates that feedback rounded, which predict indices better than these themselves.

    Args:
        z: what the coordinates were rounded to.
        error: W - W^, which holds what is left over: the coordinates are z + error L in steps.
        L: lower Cholesky factor of the input moment.
        row, col: step factors.
    """
    return rank1_spreads(z + error @ L / np.outer(row, col * np.diagonal(L)))
