"""Two-sided feedback: trellis quantization in the metric of both moments, tr(G E S E^T), along anti-diagonals.

With G = M M^T and S = L L^T the error of an entry (i, j) can be taken back by the entries (i', j') with i' <= i and
j' <= j. Entries of one anti-diagonal i + j = t cannot take back each other's errors, so a trellis may run along it
without interfering with either feedback. The diagonals i + j = w (mod n) form lane w, whose trellis goes on from one
diagonal to the next.
"""

from typing import no_type_check

import numpy as np
from jaxtyping import Float
from numba import njit

from rdopt.codec.columns import Path, Rates
from rdopt.codec.trellis import next_states, viterbi, walk


@njit(cache=True, nogil=True, fastmath=True)
@no_type_check
def _dot(a, b):
    total = 0.0
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@njit(cache=True, nogil=True)
@no_type_check
def _waves(Y, left, right, rows, cols, bits, mu, step, k, values, grids):
    """Runs over the anti-diagonals of Y (out, in), whose entries are targets in steps.

    left[i, i'] and right[j, j'] say how an entry (i', j'), i' >= i, j' >= j, moves the target of (i, j); both
    have unit diagonals.
    """
    m, n = Y.shape
    taken = np.zeros((m, n))  # values as floats, row by row
    carried = np.zeros((n, m))  # sum over j' >= j of values_ij' right[j, j'], column by column
    x, classes = np.empty(m), np.empty(m, np.int64)
    path, used, grid = np.empty(m, np.int32), np.empty(m, np.int32), np.empty(m, np.uint8)
    machine = np.zeros(n, np.int64)
    for total in range(m + n - 2, -1, -1):
        top, bottom = min(m - 1, total), max(0, total - n + 1)
        length = top - bottom + 1
        for at in range(length):
            i = top - at
            j = total - i
            carried[j, i] = _dot(taken[i, j + 1 :], right[j, j + 1 :])
            x[at] = Y[i, j] - carried[j, i] - _dot(carried[j, i + 1 :], left[i, i + 1 :])
            classes[at] = rows[i] + cols[j]
        lane = total % n
        viterbi(x[:length], classes[:length], bits, mu, step, machine[lane], path[:length])
        machine[lane] = walk(path[:length], step, machine[lane], used[:length], grid[:length])
        for at in range(length):
            i = top - at
            j = total - i
            taken[i, j] = used[at]
            carried[j, i] += used[at]
            k[i, j], values[i, j], grids[i, j] = path[at], used[at], grid[at]


def quantize_wavefront(
    W: Float[np.ndarray, "out in"],
    L: Float[np.ndarray, "in in"],
    M: Float[np.ndarray, "out out"],
    row: Float[np.ndarray, " out"],
    col: Float[np.ndarray, " in"],
    rates: Rates,
    states: int,
) -> Path:
    """Minimises |M^T (W - row values col) L|^2 + rate greedily, diagonal by diagonal from the last.

    Costs (out + in) / 2 multiply-adds an entry.

    Args:
        W: weights.
        L: lower Cholesky factor of the damped second moments of the input.
        M: lower Cholesky factor of the damped second moments of the output's gradient.
        row, col: positive step factors; the pivots row_i M_ii col_j L_jj should not vary much.
        rates: of the trellis.
        states: of the trellis; lanes never restart.

    Returns:
        indices with W ~ row_i values_ij col_j. Computed in float64.
    """
    left, right = row[:, None] * M, col[:, None] * L
    pivots = np.outer(np.diagonal(left), np.diagonal(right))
    Y = (M.T @ np.asarray(W, np.float64) @ L) / pivots
    left = np.ascontiguousarray((left / np.diagonal(left)).T)
    right = np.ascontiguousarray((right / np.diagonal(right)).T)
    k, values, grids = np.empty(Y.shape, np.int32), np.empty(Y.shape, np.int32), np.empty(Y.shape, np.uint8)
    bits = np.ascontiguousarray(rates.bits, np.float32)
    _waves(Y, left, right, rates.rows, rates.cols, bits, rates.mu, next_states(states), k, values, grids)
    return Path(k, values, grids)
