"""Two-sided feedback: trellis quantization in the metric of both moments, tr(G E S E^T), along anti-diagonals.

With G = M M^T and S = L L^T the error of an entry (i, j) can be taken back by the entries (i', j') with i' <= i and
j' <= j. Entries of one anti-diagonal i + j = t cannot take back each other's errors, so a trellis may run along it
without interfering with either feedback. The diagonals i + j = w (mod n) form lane w, whose trellis goes on from one
diagonal to the next.

Updates are lazy: what the entries two tiles away or more have left over reaches a tile by matrix products, once, before
the first diagonal that cuts it.
"""

from typing import no_type_check

import numpy as np
from jaxtyping import Float

from rdopt.codec.grids.trellis import RateTerm, TrellisPath, next_states, viterbi, walk
from rdopt.transforms.kernels import kernel

TILE = 32


@kernel(fastmath=True)
@no_type_check
def _dot(a, b, low, high):
    total = 0.0
    for i in range(low, high):
        total += a[i] * b[i]
    return total


@kernel()
@no_type_check
def _waves(first, last, Y, E, carried, left, right, rows, cols, bits, mu, step, machine, k, values, grids, targets):
    """Runs over the anti-diagonals first, first - 1, .. last of Y (out, in), weights in steps.

    left[i, i'] and right[j, j'] say how the error of an entry (i', j'), i' >= i, j' >= j, moves the target of (i, j);
    both have unit diagonals. E holds the errors Y - values, row by row, and `carried` the sums over j' >= j of
    E_ij' right[j, j'], column by column; the share of tiles two away or more is already in Y and carried.

    Args:
        first, last: the anti-diagonals.
        Y, E, carried, left, right: targets, errors and how they move targets.
        rows, cols, bits, mu: the fields of a RateTerm.
        step, machine: next states, and the state of every lane, changed in place.
        k, values, grids, targets: the fields of a TrellisPath, filled.
    """
    # The target of (i, j) is moved by sum_i' left[i, i'] sum_j' right[j, j'] E[i', j'] over all entries behind it:
    # GPTQ's feedback (2210.17323) on both sides. The inner sums are shared by a whole column of entries and kept in
    # `carried`, so an entry costs two dot products, each at most two tiles long: the rest came by matrix products.
    m, n = Y.shape
    x, classes = np.empty(m), np.empty(m, np.int64)
    path, used, grid = np.empty(m, np.int32), np.empty(m, np.int32), np.empty(m, np.uint8)
    for total in range(first, last - 1, -1):
        top, bottom = min(m - 1, total), max(0, total - n + 1)
        length = top - bottom + 1
        for at in range(length):
            i = top - at
            j = total - i
            carried[j, i] += _dot(E[i], right[j], j + 1, min(n, (j // TILE + 2) * TILE))
            x[at] = Y[i, j] + carried[j, i] + _dot(carried[j], left[i], i + 1, min(m, (i // TILE + 2) * TILE))
            classes[at] = rows[i] + cols[j]
        # No entry of this diagonal moves another's target, so the best path is that without feedback.
        lane = total % n
        viterbi(x[:length], classes[:length], bits, mu, step, machine[lane], path[:length])
        machine[lane] = walk(path[:length], step, machine[lane], used[:length], grid[:length])
        for at in range(length):
            i = top - at
            j = total - i
            E[i, j] -= used[at]
            carried[j, i] += E[i, j]
            k[i, j], values[i, j], grids[i, j], targets[i, j] = path[at], used[at], grid[at], x[at]


def quantize_wavefront(
    W: Float[np.ndarray, "out in"],
    L: Float[np.ndarray, "in in"],
    M: Float[np.ndarray, "out out"],
    row: Float[np.ndarray, " out"],
    col: Float[np.ndarray, " in"],
    rates: RateTerm,
    states: int,
) -> TrellisPath:
    """Minimises |M^T (W - row values col) L|^2 + rate greedily, diagonal by diagonal from the last.

    Costs (out + in) / 2 multiply-adds an entry, nearly all of them in matrix products.

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
    left = np.ascontiguousarray((left / np.diagonal(left)).T)
    right = np.ascontiguousarray((right / np.diagonal(right)).T)
    E = np.asarray(W, np.float64) / row[:, None] / col
    Y = E.copy()
    (m, n), kinds = Y.shape, (np.int32, np.int32, np.uint8, np.float32)
    filled = TrellisPath(*(np.empty(Y.shape, kind) for kind in kinds))
    carried, machine = np.zeros((n, m)), np.zeros(n, np.int64)
    bits, step = np.ascontiguousarray(rates.bits, np.float32), next_states(states)
    tiles = -(-m // TILE), -(-n // TILE)
    for total in range(sum(tiles) - 2, -1, -1):
        for I in range(max(0, total - tiles[1] + 1), min(tiles[0] - 1, total) + 1):
            i, j = I * TILE, (total - I) * TILE
            here, there = slice(i, i + TILE), slice(j, j + TILE)
            below, behind = slice(i + 2 * TILE, m), slice(j + 2 * TILE, n)
            carried[there, here] = right[there, behind] @ E[here, behind].T
            Y[here, there] += left[here, below] @ carried[there, below].T
        first, last = min(m + n - 2, (total + 2) * TILE - 2), (total + 1) * TILE - 1 if total else 0
        _waves(
            first, last, Y, E, carried, left, right, rates.rows, rates.cols, bits, rates.mu, step, machine,
            *filled,
        )
    return filled
