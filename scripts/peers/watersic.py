"""WaterSIC (Lifar, Savkin, Ordentlich, Polyanskiy 2603.04956): a step per column from waterfilling, by interference
cancellation.

    S + d mean(diag S) I = L L^T,  Y = W L,  alpha_j = c / L_jj
    for j = n-1 .. 0:  z_j = round(Y_j / c),  gamma_j = <z_j, Y_j> / (c |z_j|^2),  Y <- Y - gamma_j alpha_j z_j L_j,:

Published settings, read from the authors' code (github.com/egorlifar/watersic) where the paper's abstract and
introduction are silent; its appendix was not at hand: d = 1e-4; inputs with a second moment below 1e-3 of the median
are dead, their columns zero; gamma_j is the LMMSE gain; afterwards a row scale t and a column scale g minimise the
output error of t_i z_ij alpha_j g_j alternately, until it changes by less than 3e-4, g kept in [-0.1, 1.5]; one rate
for every matrix (their controller passes what one leaves over to the next; here every matrix meets the rate itself);
the rate is the entropy of all indices of a matrix plus 16 bits a row and a column.

Drift of the inputs after Qronos and residual compensation are in `peers.encode`. Left out: attention-weighted moments,
the search for a mixture of the moments, rows zeroed by hand, and finetuning.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from peers.peer_file import PeerMatrix, snap_scales
from rdopt.config.errors import UserError

GainRule = Literal["rescaled", "lmmse", "none"]
WATERSIC_DAMPING, DEAD_INPUT = 1e-4, 1e-3  # published
_BLOCK = 32  # columns updated at once; the result does not depend on it
_ROUNDS, _TOLERANCE, _RIDGE = 1000, 3e-4, 1e-8
_GAIN_RANGE = (-0.1, 1.5)


class WeightedMatrix(NamedTuple):
    """A matrix and its metric, dead inputs removed.

    Attributes:
        W: weights of the live inputs, float64.
        sigma: second moment of the live inputs, float64.
        L: lower Cholesky factor of the damped sigma.
        live: which inputs live.
    """

    W: Float[np.ndarray, "out live"]
    sigma: Float[np.ndarray, "live live"]
    L: Float[np.ndarray, "live live"]
    live: Bool[np.ndarray, " in"]


def weighted_matrix(
    W: Float[np.ndarray, "out in"], sigma: Float[np.ndarray, "in in"], damping: float = WATERSIC_DAMPING
) -> WeightedMatrix:
    """Removes dead inputs and factors the damped moments.

    Raises:
        UserError: the damped moments are singular.
    """
    diag = np.diagonal(sigma)
    live = (diag > 0) & (diag >= DEAD_INPUT * np.median(diag))
    S = np.asarray(sigma, np.float64)[np.ix_(live, live)]
    try:
        L = np.linalg.cholesky(S + damping * np.mean(np.diagonal(S)) * np.eye(len(S)))
    except np.linalg.LinAlgError as error:
        raise UserError("WaterSIC needs positive second moments; raise its damping (1e-4 is published).") from error
    return WeightedMatrix(np.asarray(W, np.float64)[:, live], S, L, live)


def high_rate_step(matrix: WeightedMatrix, rate: float) -> float:
    """c that gives `rate` bits/weight at high resolution: mean_j log2 sqrt(12 E[W_j^2] L_jj^2) - rate octaves."""
    power = np.mean(matrix.W**2, axis=0) * np.diagonal(matrix.L) ** 2
    logs = np.log2(12 * power[power > 0])
    return float(np.exp2(np.mean(logs) / 2 - rate)) if len(logs) else 1.0


def cancel(
    matrix: WeightedMatrix, c: float, gains: GainRule
) -> tuple[Int[np.ndarray, "out live"], Float[np.ndarray, " live"], Float[np.ndarray, " live"]]:
    """Successive interference cancellation: indices, column steps alpha (on the file's grid) and gains gamma."""
    L = matrix.L
    alpha = snap_scales(c / np.diagonal(L))
    step = alpha * np.diagonal(L)
    Y = matrix.W @ L
    z, gamma = np.zeros(Y.shape, np.int32), np.ones(Y.shape[1])
    for high in range(Y.shape[1], 0, -_BLOCK):
        low = max(high - _BLOCK, 0)
        for j in range(high - 1, low - 1, -1):
            rounded = np.rint(Y[:, j] / step[j])
            z[:, j] = rounded
            energy = float(rounded @ rounded)
            if gains != "none":
                gamma[j] = float(rounded @ Y[:, j]) / (step[j] * energy) if energy > 0 else 0.0
            if energy > 0:
                Y[:, low:j] -= np.outer(rounded, gamma[j] * alpha[j] * L[j, low:j])
        Y[:, :low] -= (z[:, low:high] * (gamma * alpha)[low:high]) @ L[low:high, :low]
    return z, alpha, gamma


def rescale(
    matrix: WeightedMatrix, unscaled: Float[np.ndarray, "out live"], gamma: Float[np.ndarray, " live"]
) -> tuple[Float[np.ndarray, " out"], Float[np.ndarray, " live"]]:
    """Row scales t and column scales g of least output error tr((W - t V g) S (W - t V g)^T), V the unscaled fit.

    Alternating least squares: g solves (S o V^T t^2 V) g = diag(V^T t W S), then t_i is a ratio of row products.
    """
    W, S, V = matrix.W, matrix.sigma, unscaled
    WS, t, g = W @ S, np.ones(len(W)), gamma.copy()
    total = float(np.sum(WS * W))

    def loss(t: np.ndarray, g: np.ndarray) -> float:
        fit = t[:, None] * V * g
        return total - 2 * float(np.sum(WS * fit)) + float(np.sum((fit @ S) * fit))

    best = loss(t, g)
    for _ in range(_ROUNDS):
        F = S * (V.T @ (t[:, None] ** 2 * V))
        ridge = max(_RIDGE * float(np.mean(np.abs(np.diagonal(F)))), np.finfo(float).tiny)
        new_g = np.linalg.solve(F + ridge * np.eye(len(F)), np.sum(V * (t[:, None] * WS), axis=0))
        new_g = np.clip(new_g, *_GAIN_RANGE)
        M = V * new_g
        power = np.sum((M @ S) * M, axis=1)
        new_t = np.sum(WS * M, axis=1) / (power + max(_RIDGE * float(power.mean()), np.finfo(float).tiny))
        norm = float(np.mean(np.abs(new_t)))
        if norm == 0 or (now := loss(new_t, new_g)) > best:
            break
        t, g, change, best = new_t / norm, new_g * norm, best - now, now
        if change < _TOLERANCE * best:
            break
    return t, g


def watersic(matrix: WeightedMatrix, c: float, gains: GainRule = "rescaled") -> PeerMatrix:
    """Quantizes a matrix at the step c.

    Args:
        matrix: of `weighted_matrix`.
        c: step of every column in the metric of its input.
        gains: "rescaled", as published; "lmmse" stops before the rescalers; "none" leaves out every gain.

    Returns:
        indices and scales of the whole matrix, dead columns zero; signs of negative scales are moved into the
        indices, which the file codes with equal odds for both.
    """
    z, alpha, gamma = cancel(matrix, c, gains)
    t, g = np.ones(len(z)), gamma
    if gains == "rescaled":
        t, g = rescale(matrix, z * alpha, gamma)
    z = z * np.where(t < 0, -1, 1)[:, None] * np.where(g < 0, -1, 1) * ((t != 0)[:, None] & (g != 0))
    out, col = np.zeros((len(z), len(matrix.live)), np.int32), np.zeros(len(matrix.live))
    out[:, matrix.live], col[matrix.live] = z, np.abs(alpha * g)
    return PeerMatrix(out, np.abs(t), col)
