"""Trellis quantization with error feedback over the columns: the trellis runs down a column, over the rows.

With one step per column (a_j = c / L_jj, successive interference cancellation) all entries of a column weigh the
same, so a path through the trellis and the feedback to the columns before do not interfere (WaterSIC 2026).
"""

from typing import no_type_check

import numpy as np
from jaxtyping import Float

from rdopt.codec.grids.trellis import SEGMENT, RateTerm, TrellisPath, next_states, viterbi, walk
from rdopt.encode.feedback import BLOCK
from rdopt.transforms.kernels import kernel


@kernel()
@no_type_check
def _block_of_columns(Y, M, low, high, rows, cols, bits, mu, step, segment, k, values, grids, targets):
    """Quantizes columns high-1 .. low, the rows of Y (high - low, out), feeding errors back inside the block."""
    length = Y.shape[1]
    x, classes = np.empty(length), np.empty(length, np.int64)
    for j in range(high - 1, low - 1, -1):
        for i in range(length):
            x[i] = targets[j, i] = Y[j - low, i] / M[j, j]
            classes[i] = rows[i] + cols[j]
        for first in range(0, length, segment):
            part = slice(first, first + segment)
            viterbi(x[part], classes[part], bits, mu, step, 0, k[j, part])
            walk(k[j, part], step, 0, values[j, part], grids[j, part])
        for i in range(length):
            x[i] = values[j, i]
        for before in range(low, j):
            factor = M[j, before]
            for i in range(length):
                Y[before - low, i] -= factor * x[i]


def quantize_columns(
    W: Float[np.ndarray, "out in"],
    L: Float[np.ndarray, "in in"],
    row: Float[np.ndarray, " out"],
    col: Float[np.ndarray, " in"],
    rates: RateTerm,
    states: int,
) -> TrellisPath:
    """Minimises |(W - row values col) L|^2 + rate greedily, column by column from the last.

    Updates are lazy: inside a block of columns at once, from the columns behind it as one matrix product.

    Args:
        W: weights.
        L: lower Cholesky factor of the damped second moments of the input.
        row, col: positive step factors, half a scalar step each entry.
        rates: of the trellis.
        states: of the trellis; lanes restart every SEGMENT rows.

    Returns:
        indices with W ~ row_i values_ij col_j. Computed in float64.
    """
    E = np.asarray(W, np.float64).T / row  # what is left: the weights, then the errors they are coded with
    M = col[:, None] * L
    shape, step = E.shape, next_states(states)
    k, values, grids, targets = (np.empty(shape, kind) for kind in (np.int32, np.int32, np.uint8, np.float32))
    bits = np.ascontiguousarray(rates.bits, np.float32)
    for high in range(shape[0], 0, -BLOCK):
        low = max(high - BLOCK, 0)
        Y = L[low:, low:high].T @ E[low:]
        _block_of_columns(
            Y, M, low, high, rates.rows, rates.cols, bits, rates.mu, step, SEGMENT, k, values, grids, targets
        )
        E[low:high] -= col[low:high, None] * values[low:high]
    return TrellisPath(k.T, values.T, grids.T, targets.T)
