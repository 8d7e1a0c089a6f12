"""Feedback quantization: successive interference cancellation in GPTQ order.

With S = L L^T, |E L|^2 is the output error of a weight error E. Columns are quantized from the last to the
first, and each passes the error it makes to the columns before it through L (GPTQ, 2210.17323; LDLQ, QuIP;
the step per column a_j = c / L_jj makes every column's error weigh the same: WaterSIC).
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from rdopt.codec.grids.uniform import round_dead_zone
from rdopt.config.schema import LoopGain

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
    return _successively(W, L, row, col, dead_zone, lambda z, y: 0, 1)[0]


def quantize_with_gains(
    W: Float[np.ndarray, "out in"],
    L: Float[np.ndarray, "in in"],
    row: Float[np.ndarray, " out"],
    col: Float[np.ndarray, " in"],
    dead_zone: float,
    kind: LoopGain,
    precision: int,
) -> tuple[Int[np.ndarray, "out in"], Int[np.ndarray, " in"]]:
    """`quantize_feedback` with a gain a column, in the loop: what a column passes on is the error behind its gain.

    Of the targets y and indices z of a column in steps: shrink, <z, y> / <z, z>, has the least error (WaterSIC 2026);
    unbiased, <y, y> / <z, y>, leaves an error that is uncorrelated with y.

    Args:
        W, L, row, col, dead_zone: see `quantize_feedback`.
        kind: of gain.
        precision: gains are multiples of 1 / precision octave.

    Returns:
        (int32 indices, int32 log gains): W ~ row_i z_ij col_j 2^(gain_j / precision).
    """
    gains = {"shrink": lambda z, y: (z @ y, z @ z), "unbiased": lambda z, y: (y @ y, z @ y)}

    def gain(z: Int[np.ndarray, " out"], y: Float[np.ndarray, " out"]) -> int:
        over, under = gains[kind](z.astype(np.float64), y)
        return round(precision * float(np.log2(over / under))) if over > 0 and under > 0 else 0

    return _successively(W, L, row, col, dead_zone, gain, precision)


def _successively(
    W: Float[np.ndarray, "out in"],
    L: Float[np.ndarray, "in in"],
    row: Float[np.ndarray, " out"],
    col: Float[np.ndarray, " in"],
    dead_zone: float,
    gain: Callable[[Int[np.ndarray, " out"], Float[np.ndarray, " out"]], int],
    precision: int,
) -> tuple[Int[np.ndarray, "out in"], Int[np.ndarray, " in"]]:
    """(indices, log gains) with `gain` of a column's indices and targets."""
    E = np.asarray(W, np.float64).T / np.asarray(row, np.float64)
    M = np.asarray(col, np.float64)[:, None] * L
    z, logs = np.zeros(E.shape, np.int32), np.zeros(len(E), np.int32)
    for high in range(len(E), 0, -BLOCK):
        low = max(high - BLOCK, 0)
        Y = L[low:, low:high].T @ E[low:]
        for j in range(high - 1, low - 1, -1):
            y = Y[j - low] / M[j, j]
            z[j] = round_dead_zone(y, dead_zone)
            logs[j] = gain(z[j], y)
            Y[: j - low] -= np.outer(2.0 ** (logs[j] / precision) * M[j, low:j], z[j])
        steps = col[low:high] * 2.0 ** (logs[low:high] / precision)
        E[low:high] -= steps[:, None] * z[low:high]
    return np.ascontiguousarray(z.T), logs
