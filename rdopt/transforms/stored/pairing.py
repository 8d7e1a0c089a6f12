"""Learned pairings: layers of disjoint Givens pairs, each pair chosen and turned for what it saves.

The criterion is Pham's (2001, SIAM J. Matrix Anal. Appl. 22:1136), as in joint diagonalisation. A layer pairs axes
greedily by the bits that the best angle of each pair saves (ParoQuant, 2511.10645, pairs by magnitude instead). Angles
and pairs are those of `apply_givens`: rows x become x G, moments G^T C G.
"""

from math import lgamma, log
from typing import no_type_check

import numpy as np
from jaxtyping import Float, Int

from rdopt.transforms.kernels import kernel
from rdopt.transforms.matrices.givens import Pairs, apply_givens

_STEPS = 12  # of the angle of a pair, at most; the cost never rises from one to the next


def learned_pairs(
    C: Float[np.ndarray, "k n n"], weights: Float[np.ndarray, " k"], layers: int
) -> tuple[Pairs, Float[np.ndarray, " p"]]:
    """Layers of disjoint pairs and their angles, each layer the greedy best behind those before it.

    A layer takes O(k n^2) for all pairs and O(n^2 log n) to match them.

    Args:
        C: symmetric positive definite moments of the rows that the transform will turn, float64; n >= 2.
        weights: n_k, the number of rows behind each moment.
        layers: how many.

    Returns:
        (pairs, angles): floor(n / 2) pairs a layer, and radians in [-pi/4, pi/4], one a pair, layer after layer.
    """
    pairs, angles = [], []
    for _ in range(layers):
        gains, best = pair_gains(C, weights)
        layer = greedy_matching(gains)
        pairs.append(layer)
        angles.append(best[layer[:, 0], layer[:, 1]])
        C = turned_moments(C, angles[-1], (layer,))
    return tuple(pairs), np.concatenate([np.zeros(0), *angles])


def fitted_angles(
    C: Float[np.ndarray, "k n n"], weights: Float[np.ndarray, " k"], pairs: Pairs
) -> Float[np.ndarray, " p"]:
    """The angles of given pairs (a butterfly's, say), layer by layer, each the best behind the layers before it."""
    angles = []
    for layer in pairs:
        i, j = layer[:, 0], layer[:, 1]
        angles.append(_gains_of_pairs(C[:, i, i], C[:, j, j], C[:, i, j], np.asarray(weights, np.float64))[1])
        C = turned_moments(C, angles[-1], (layer,))
    return np.concatenate([np.zeros(0), *angles])


def pair_gains(
    C: Float[np.ndarray, "k n n"], weights: Float[np.ndarray, " k"]
) -> tuple[Float[np.ndarray, "n n"], Float[np.ndarray, "n n"]]:
    """What each pair of axes saves alone.

    Args:
        C: symmetric positive definite moments, float64.
        weights: n_k, positive.

    Returns:
        (gains, angles): bits of `joint_cost` saved by the best angle of (i, j), symmetric, zero on the diagonal; the
        angle of `apply_givens` for i < j, zero elsewhere.
    """
    n = C.shape[1]
    i, j = np.triu_indices(n, 1)
    power = np.diagonal(C, axis1=1, axis2=2)
    gains, angles = np.zeros((n, n)), np.zeros((n, n))
    gains[i, j], angles[i, j] = _gains_of_pairs(power[:, i], power[:, j], C[:, i, j], np.asarray(weights, np.float64))
    gains[j, i] = gains[i, j]
    return gains, angles


def greedy_matching(gains: Float[np.ndarray, "n n"]) -> Int[np.ndarray, "pairs 2"]:
    """floor(n / 2) disjoint pairs i < j: the pair of the largest gain, then that of what is left, and so on.

    They are returned in ascending order of i, the one order in which a file names a pairing.
    """
    i, j = np.triu_indices(len(gains), 1)
    order = np.argsort(-gains[i, j], kind="stable")
    pairs = _match(i[order], j[order], len(gains))
    return pairs[np.argsort(pairs[:, 0])]


def turned_moments(
    C: Float[np.ndarray, "k n n"], angles: Float[np.ndarray, " p"], pairs: Pairs
) -> Float[np.ndarray, "k n n"]:
    """G^T C G."""
    half = apply_givens(C, angles, pairs).swapaxes(1, 2)
    return apply_givens(half, angles, pairs)


def pairing_bits(n: int, layers: int = 1) -> float:
    """log2 of the number of ways to pair n axes (one is left over when n is odd), times the layers."""
    k = n // 2
    return layers * (lgamma(n + 1) - lgamma(k + 1) - k * log(2)) / log(2)


@kernel()
@no_type_check
def _match(i, j, n):
    """Pairs in the given order, those with an axis already taken left out."""
    free, pairs, count = np.ones(n, np.bool_), np.empty((n // 2, 2), np.int64), 0
    for at in range(len(i)):
        if free[i[at]] and free[j[at]]:
            free[i[at]] = free[j[at]] = False
            pairs[count, 0], pairs[count, 1] = i[at], j[at]
            count += 1
            if count == n // 2:
                break
    return pairs


@kernel()
@no_type_check
def _gains_of_pairs(first, second, cross, weights):
    """Bits and angles of pairs whose moments are [[first, cross], [cross, second]], each (k, pairs).

    A pair turned by t has the entries m + x and m - x, x = h cos 2t + o sin 2t, and costs 1/2 sum_k n_k log(m^2 - x^2).
    The logarithm is concave, so the tangent in x^2 bounds the cost from above; the least of the bound is the first
    eigenvector (cos 2t, sin 2t) of sum_k u_k [h, o]^T [h, o], u_k = n_k / (m^2 - x^2). The first tangent lies at x = 0.
    """
    count, pairs = first.shape
    gains, angles = np.zeros(pairs), np.zeros(pairs)
    square, half, slope = np.empty(count), np.empty(count), np.empty(count)
    for at in range(pairs):
        for k in range(count):
            square[k] = ((first[k, at] + second[k, at]) / 2) ** 2
            half[k] = (first[k, at] - second[k, at]) / 2
            slope[k] = weights[k] / square[k]
        theta = 0.0
        for _ in range(_STEPS if count > 1 else 1):
            a, b, d = 0.0, 0.0, 0.0
            for k in range(count):
                o = cross[k, at]
                a, b, d = a + slope[k] * half[k] * half[k], b + slope[k] * o * o, d + slope[k] * half[k] * o
            last, theta = theta, np.arctan2(2 * d, a - b) / 2
            if abs(theta - last) < 1e-9:
                break
            for k in range(count):
                slope[k] = weights[k] / (square[k] - _lean(theta, half[k], cross[k, at]) ** 2)
        saved = 0.0
        for k in range(count):
            least = square[k] - _lean(theta, half[k], cross[k, at]) ** 2
            saved += weights[k] * np.log2((square[k] - half[k] * half[k]) / least) / 2
        if saved > 0.0:
            gains[at], angles[at] = saved, -theta / 2
    return gains, angles


@kernel()
@no_type_check
def _lean(theta, half, cross):
    """x, by which the turned entries differ from their mean."""
    return half * np.cos(theta) + cross * np.sin(theta)
