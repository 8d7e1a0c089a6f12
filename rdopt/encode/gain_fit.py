"""Gains of a quantized matrix before they are rounded: unbiased ones of the rows, or least squares of rows and columns.

The least-squares gains are WaterSIC's rescalers (2026).
"""

import numpy as np
import scipy.linalg
from jaxtyping import Float

from rdopt.codec.streams.gains import PRECISIONS
from rdopt.config.schema import Correction

_LARGEST = 2.0  # of an unbiased gain, and its inverse the smallest
_SMALLEST = 1 / 16
_RIDGE = 1e-10


def fit_gains(
    kind: Correction,
    W: Float[np.ndarray, "out in"],
    What: Float[np.ndarray, "out in"],
    sigma: Float[np.ndarray, "in in"],
    g: Float[np.ndarray, " out"],
) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " cols"]]:
    """log2 of the row and of the column gains of one matrix, empty where there are none; see the functions below."""
    none = np.zeros(0)
    if kind == "unbiased":
        return np.log2(unbiased_gains(W, What, sigma)), none
    if kind == "least-squares":
        a, b = least_squares_gains(W, What, sigma, g)
        return np.log2(a), np.log2(b)
    return none, none


def gain_precision(gains: int, weights: int, lam: float, distortion: float) -> int:
    """The precision with the least log2(precision) bits a gain / weights + lam D, D what rounding adds.

    Args:
        gains: how many there are.
        weights: the bits are counted per weight.
        lam: bits/weight per nat/token.
        distortion: what a relative error of variance one in all gains would cost, nats/token: 1/2 tr(G W sigma W^T)
            summed over the matrices, once for rows and once for columns.
    """

    def cost(precision: int) -> float:
        return gains * np.log2(precision) / weights + lam * distortion * rounding_variance(precision)

    return min(PRECISIONS, key=cost)


def rounding_variance(precision: int) -> float:
    """Relative variance of a gain rounded to 1 / precision octave, independent of the others."""
    return (np.log(2) / precision) ** 2 / 12


def unbiased_gains(
    W: Float[np.ndarray, "out in"], What: Float[np.ndarray, "out in"], sigma: Float[np.ndarray, "in in"]
) -> Float[np.ndarray, " out"]:
    """Row gains a that make the output error uncorrelated with the output, <a W^ - W, W>_sigma = 0; float64.

    Choosing cheap indices shrinks the weights; what is coherent with the signal adds up over tokens and layers.
    """
    weighted = np.asarray(W, np.float64) @ sigma
    wanted, found = np.sum(weighted * W, axis=1), np.sum(weighted * What, axis=1)
    ratio = np.divide(wanted, found, out=np.ones_like(wanted), where=found > 0)
    return np.clip(ratio, 1 / _LARGEST, _LARGEST)


def least_squares_gains(
    W: Float[np.ndarray, "out in"],
    What: Float[np.ndarray, "out in"],
    sigma: Float[np.ndarray, "in in"],
    g: Float[np.ndarray, " out"],
    iterations: int = 4,
) -> tuple[Float[np.ndarray, " out"], Float[np.ndarray, " in"]]:
    """Row gains a and column gains b that bring diag(a) What diag(b) close to W; float64.

    Alternating least squares of sum_i g_i e_i sigma e_i^T, e_i a row of the error: rows in closed form,
    columns by one linear solve; no step raises the error. A gain whose optimum is below 1/16, or not positive,
    keeps its value in that step. The geometric mean of b is 1.

    Args:
        W: the weights.
        What: what they were quantized to.
        sigma: second moment of the input, positive semidefinite.
        g: weights of the rows, positive.
        iterations: of a row step and a column step.
    """
    W, What, sigma = (np.asarray(x, np.float64) for x in (W, What, sigma))
    a, b = np.ones(len(W)), np.ones(W.shape[1])
    target = W @ sigma
    for _ in range(iterations):
        a = _row_step(What * b, target, sigma, a)
        b = _column_step(What, a, target, sigma, g, b)
    live = np.any(What != 0, axis=0)
    shift = np.exp(np.mean(np.log(b[live]))) if live.any() else 1.0
    return a * shift, np.where(live, b / shift, 1.0)


def _row_step(
    V: Float[np.ndarray, "out in"],
    target: Float[np.ndarray, "out in"],
    sigma: Float[np.ndarray, "in in"],
    a: Float[np.ndarray, " out"],
) -> Float[np.ndarray, " out"]:
    """a_i = <V_i, W_i>_sigma / <V_i, V_i>_sigma, target = W sigma."""
    power = np.sum((V @ sigma) * V, axis=1)
    best = np.divide(np.sum(target * V, axis=1), power, out=a.copy(), where=power > 0)
    return np.where(best >= _SMALLEST, best, a)


def _column_step(
    What: Float[np.ndarray, "out in"],
    a: Float[np.ndarray, " out"],
    target: Float[np.ndarray, "out in"],
    sigma: Float[np.ndarray, "in in"],
    g: Float[np.ndarray, " out"],
    b: Float[np.ndarray, " in"],
) -> Float[np.ndarray, " in"]:
    """M b = r with M = (What^T diag(g a^2) What) * sigma, r_j = sum_i g_i a_i What_ij (W sigma)_ij.

    M is positive semidefinite (Schur). The step from b is what is solved for, so that directions which M does
    not feel keep their gains.
    """
    M = (What.T @ (What * (g * a**2)[:, None])) * sigma
    r = np.sum((g * a)[:, None] * What * target, axis=0)
    free = np.diagonal(M) > 0
    while free.any():
        trial = b.copy()
        trial[free] += _solve(M[np.ix_(free, free)], (r - M @ b)[free])
        if trial[free].min() >= _SMALLEST:
            return trial
        free &= trial >= _SMALLEST
    return b


def _solve(M: Float[np.ndarray, "n n"], r: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """M^-1 r for semidefinite M: scaled to a unit diagonal, which is then raised by a hair."""
    scale = 1 / np.sqrt(np.diagonal(M))
    scaled = M * np.outer(scale, scale) + _RIDGE * np.eye(len(M))
    return scale * scipy.linalg.solve(scaled, scale * r, assume_a="pos")
