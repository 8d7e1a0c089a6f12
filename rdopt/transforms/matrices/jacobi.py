"""Joint approximate diagonalisation of several moments by one rotation: Jacobi sweeps on Pham's criterion.

Pham (2001, SIAM J. Matrix Anal. Appl. 22:1136) measures how far symmetric positive definite C_k are from diagonal in
the basis Q by sum_k n_k (log det diag(Q^T C_k Q) - log det C_k). With C_k the second moment of a matrix's n_k rows,
half its log2 is what entropy-coded quantization with a scale per column pays at high rate above independent columns.
Unlike Pham's, Q stays orthogonal, for the residual stream allows nothing else.

The axes are dealt into blocks, and blocks meet in the rounds of a tournament (block Jacobi; Golub and Van Loan, Matrix
Computations, 8.5). Where two blocks meet, their pairs of axes are turned one by one inside a small matrix; the rest of
the C_k follows by products. The turns are those of Jacobi's method in another cyclic order, so the cost never rises.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float, Int

from rdopt.config.parallel import on_cores
from rdopt.transforms.kernels import kernel
from rdopt.transforms.matrices.givens import round_robin

_WIDTH = 32  # axes of a block, at most: products of 64 x 64 x 64 stay in the cache and on their thread
_TRIALS = 8  # arcs in which a pair's best angle is looked for
_NEWTON = 12  # steps at most towards an angle
_SMALLEST = 1e-5  # radians: a smaller turn saves less than any tolerance


class _Tiles(NamedTuple):
    """The C_k and the basis in tiles of the blocks, padded with zeros; tiles of the C_k below the diagonal are stale.

    Attributes:
        C: the moments.
        axes: the axes as rows.
    """

    C: Float[np.ndarray, "k blocks blocks w w"]
    axes: Float[np.ndarray, "blocks blocks w w"]


def joint_cost(C: Float[np.ndarray, "k n n"], weights: Float[np.ndarray, " k"]) -> float:
    """1/2 sum_k n_k log2 det diag C_k, bits, in the basis that the C_k are given in."""
    return _diagonal_cost(np.diagonal(C, axis1=1, axis2=2), weights)


def _diagonal_cost(diagonal: Float[np.ndarray, "k n"], weights: Float[np.ndarray, " k"]) -> float:
    return float(0.5 * np.sum(weights[:, None] * np.log2(diagonal)))


def joint_diagonalizer(
    C: Float[np.ndarray, "k n n"],
    weights: Float[np.ndarray, " k"],
    start: Float[np.ndarray, "n n"] | None = None,
    sweeps: int = 30,
    tolerance: float = 1e-4,
    threads: int = 0,
) -> Float[np.ndarray, "n n"]:
    """The rotation Q that minimises `joint_cost` of Q^T C_k Q, as far as Jacobi sweeps get from `start`.

    A sweep turns every pair of axes once by its best angle; the cost never rises. It takes 2 k n^3 multiply-adds in
    matrix products and, for the angles, time in proportion to k n^2.

    Args:
        C: symmetric positive definite moments, float64.
        weights: n_k, positive.
        start: the first basis, orthogonal; the identity when None.
        sweeps: at most.
        tolerance: a sweep that saves fewer bits than this an axis of an average C_k and unit of weight is the last.
        threads: 0 for all cores; the result does not depend on it.

    Returns:
        Q (n, n), float64, orthogonal to rounding; axes by falling mean power.
    """
    n, price = C.shape[1], np.asarray(weights, np.float64)
    tiles = _tiled(C, np.eye(n) if start is None else np.asarray(start, np.float64))
    diagonal = _diagonal(tiles.C, n)
    traces, cost = diagonal.sum(axis=1), _diagonal_cost(diagonal, price)
    rounds = round_robin(len(tiles.axes), len(tiles.axes) - 1)
    with on_cores(threads) as pool:
        for _ in range(sweeps):
            for number, meeting in enumerate(rounds):
                _meet(tiles, meeting, price, n, number > 0, pool)
            diagonal = _diagonal(tiles.C, n)
            before, cost = cost, _diagonal_cost(diagonal, price)
            if before - cost < tolerance * n * price.sum():
                break
    power = np.einsum("k,ki->i", price / traces, diagonal)
    width = tiles.axes.shape[0] * tiles.axes.shape[2]
    axes = tiles.axes.transpose(0, 2, 1, 3).reshape(width, width)[:n, :n]
    return axes[np.argsort(-power, kind="stable")].T


def _tiled(C: Float[np.ndarray, "k n n"], Q: Float[np.ndarray, "n n"]) -> _Tiles:
    """The moments in the basis Q and Q^T, cut into an even number of blocks."""
    count, n = len(C), len(Q)
    blocks = 2 * -(-n // (2 * _WIDTH))
    w = -(-n // blocks)
    tiles = np.zeros((count + 1, blocks, blocks, w, w))
    padded = np.zeros((blocks * w, blocks * w))
    for k in range(count + 1):
        padded[:n, :n] = Q.T if k == count else Q.T @ C[k] @ Q
        tiles[k] = padded.reshape(blocks, w, blocks, w).transpose(0, 2, 1, 3)
    return _Tiles(tiles[:count], tiles[count])


def _diagonal(C: Float[np.ndarray, "k blocks blocks w w"], n: int) -> Float[np.ndarray, "k n"]:
    return np.einsum("kbbii->kbi", C).reshape(len(C), -1)[:, :n]


def _meet(
    tiles: _Tiles,
    meeting: Int[np.ndarray, "pairs 2"],
    weights: Float[np.ndarray, " k"],
    n: int,
    crossing: bool,
    pool: ThreadPoolExecutor,
) -> None:
    """One round of the tournament, in place; a `crossing` one turns only pairs of axes from two blocks."""
    size = 2 * tiles.C.shape[-1]
    turns = np.empty((len(meeting), size, size))

    def pair(p: int) -> None:
        _turn_pair(tiles.C, meeting[p], weights, n, crossing, turns[p])

    list(pool.map(pair, range(len(meeting))))
    back = np.ascontiguousarray(turns.transpose(0, 2, 1))
    list(pool.map(lambda C: _turn_moment(C, meeting, turns, back), tiles.C))
    list(pool.map(lambda p: _turn_axes(tiles.axes, meeting[p], turns[p]), range(len(meeting))))


@kernel()
@no_type_check
def _turn_pair(C, pair, weights, n, crossing, turn):
    """Turns the axes of two blocks by the angles of least cost: their tiles in place, rows of `turn` the new axes."""
    count, w, size = C.shape[0], C.shape[3], 2 * C.shape[3]
    D = np.empty((size, size, count))  # moments innermost: a turn of two axes then runs along memory
    for s in range(2):
        for t in range(s, 2):
            for k in range(count):
                tile = C[k, pair[s], pair[t]]
                for x in range(w):
                    for y in range(w):
                        D[s * w + x, t * w + y, k] = D[t * w + y, s * w + x, k] = tile[x, y]
    turn[:] = np.eye(size)
    mean, half, off = np.empty(count), np.empty(count), np.empty(count)
    for i in range(size - 1):
        for j in range(max(i + 1, w) if crossing else i + 1, size):
            if pair[i // w] * w + i % w >= n or pair[j // w] * w + j % w >= n or (crossing and i >= w):
                continue  # padding, or a pair that met in an earlier round
            for k in range(count):
                mean[k] = (D[i, i, k] + D[j, j, k]) / 2
                half[k] = (D[i, i, k] - D[j, j, k]) / 2
                off[k] = D[i, j, k]
            angle = _best_angle(mean, half, off, weights)
            if abs(angle) > _SMALLEST:
                _turn(D, i, j, np.cos(angle), np.sin(angle))
                _turn_rows(turn[i], turn[j], np.cos(angle), np.sin(angle))
    for s in range(2):
        for t in range(s, 2):
            for k in range(count):
                C[k, pair[s], pair[t]] = D[s * w : (s + 1) * w, t * w : (t + 1) * w, k]


@kernel()
@no_type_check
def _turn(D, i, j, c, s):
    """Turns axes i and j of the moments D[:, :, k], in place."""
    size, count = D.shape[1], D.shape[2]
    _turn_rows(D[i].reshape(size * count), D[j].reshape(size * count), c, s)
    for k in range(count):
        ii, ij, ji, jj = D[i, i, k], D[i, j, k], D[j, i, k], D[j, j, k]
        D[i, i, k], D[j, j, k] = c * ii + s * ij, c * jj - s * ji
        D[i, j, k] = D[j, i, k] = c * ij - s * ii
    for x in range(size):
        for k in range(count):
            D[x, i, k] = D[i, x, k]
            D[x, j, k] = D[j, x, k]


@kernel()
@no_type_check
def _turn_rows(a, b, c, s):
    for at in range(len(a)):
        x, y = a[at], b[at]
        a[at], b[at] = c * x + s * y, c * y - s * x


@kernel()
@no_type_check
def _turn_moment(C, meeting, turns, back):
    """R_p C_pq R_q^T for every two pairs p < q of blocks of one moment, in place; back_q = R_q^T."""
    w = C.shape[2]
    X, Y = np.empty((2 * w, 2 * w)), np.empty((2 * w, 2 * w))
    for p in range(len(meeting)):
        for q in range(p + 1, len(meeting)):
            for s in range(2):
                for t in range(2):
                    a, b = meeting[p, s], meeting[q, t]
                    X[s * w : (s + 1) * w, t * w : (t + 1) * w] = C[a, b] if a < b else C[b, a].T
            np.dot(turns[p], X, Y)
            np.dot(Y, back[q], X)
            for s in range(2):
                for t in range(2):
                    a, b = meeting[p, s], meeting[q, t]
                    part = X[s * w : (s + 1) * w, t * w : (t + 1) * w]
                    if a < b:
                        C[a, b] = part
                    else:
                        C[b, a] = part.T


@kernel()
@no_type_check
def _turn_axes(axes, pair, turn):
    w = axes.shape[2]
    X, Y = np.empty((2 * w, w)), np.empty((2 * w, w))
    for column in range(axes.shape[1]):
        X[:w], X[w:] = axes[pair[0], column], axes[pair[1], column]
        np.dot(turn, X, Y)
        axes[pair[0], column], axes[pair[1], column] = Y[:w], Y[w:]


@kernel()
@no_type_check
def _cost(phi, mean, half, off, weights):
    """sum_k n_k log(m^2 - x^2), x = half cos phi + off sin phi: turned by phi / 2, a pair has the entries m + x, m - x.
    """
    total, c, s = 0.0, np.cos(phi), np.sin(phi)
    for k in range(len(mean)):
        x = half[k] * c + off[k] * s
        total += weights[k] * np.log((mean[k] + x) * (mean[k] - x))
    return total


@kernel(fastmath={"reassoc", "contract", "nsz"})
@no_type_check
def _slopes(c, s, mean, half, off, weights):
    """First and second derivative of `_cost` in phi, both halved and with the sign turned, at cos and sin of phi."""
    first, second = 0.0, 0.0
    for k in range(len(mean)):
        x, dx = half[k] * c + off[k] * s, off[k] * c - half[k] * s
        inverse = 1 / ((mean[k] + x) * (mean[k] - x))
        ratio = x * dx * inverse
        first += weights[k] * ratio
        second += weights[k] * ((dx * dx - x * x) * inverse + 2 * ratio * ratio)
    return first, second


@kernel()
@no_type_check
def _best_angle(mean, half, off, weights):
    """The angle of least cost in [-pi/4, pi/4]: the best of the minima that a grid of slopes brackets; 0 if none is
    better than none."""
    best, least = 0.0, _cost(0.0, mean, half, off, weights)
    arc = np.pi / _TRIALS
    low, rising = -np.pi / 2, 0.0
    for trial in range(_TRIALS + 1):
        phi = -np.pi / 2 + trial * arc
        slope = -_slopes(np.cos(phi), np.sin(phi), mean, half, off, weights)[0]
        if trial > 0 and rising < 0 <= slope:
            zero = _newton(low, phi, mean, half, off, weights)
            cost = _cost(zero, mean, half, off, weights)
            if cost < least:
                best, least = zero, cost
        low, rising = phi, slope
    return best / 2


@kernel()
@no_type_check
def _newton(low, high, mean, half, off, weights):
    """The zero of the slope between two phi, to 1e-6: Newton's steps, halving where they leave the bracket."""
    phi = (low + high) / 2
    for _ in range(_NEWTON):
        first, second = _slopes(np.cos(phi), np.sin(phi), mean, half, off, weights)
        if first > 0:
            low = phi
        else:
            high = phi
        after = phi - first / second if second < 0 else low - 1.0
        after = after if low < after < high else (low + high) / 2
        if abs(after - phi) < 1e-6:
            return after
        phi = after
    return phi
