"""Figures of one matrix in its present coordinates: outliers, and how unequally its energy is spread.

Effective dimensions: participation ratio (sum v)^2 / sum v^2, and the exponential of the entropy of v / sum v (Roy and
Vetterli 2007).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class WeightStatistics(NamedTuple):
    """Figures of one matrix.

    Attributes:
        rms: root mean square.
        peak: largest magnitude over rms.
        kurtosis: fourth moment over the squared second; 3 for a Gaussian.
        beyond_6_sigma: share of entries larger than six rms.
        effective_columns: exp of the entropy of the columns' energy shares, over their number; 1 is flat.
    """

    rms: float
    peak: float
    kurtosis: float
    beyond_6_sigma: float
    effective_columns: float


def weight_statistics(W: Float[np.ndarray, "out in"]) -> WeightStatistics:
    """Statistics of a matrix, float64; all zero for a zero matrix."""
    W = np.asarray(W, np.float64)
    power = np.square(W)
    mean = float(power.mean())
    if mean == 0:
        return WeightStatistics(0.0, 0.0, 0.0, 0.0, 0.0)
    rms = float(np.sqrt(mean))
    return WeightStatistics(
        rms=rms,
        peak=float(np.abs(W).max()) / rms,
        kurtosis=float(np.mean(power**2)) / mean**2,
        beyond_6_sigma=float(np.mean(np.abs(W) > 6 * rms)),
        effective_columns=_exp_entropy(power.sum(axis=0) / power.sum()) / W.shape[1],
    )


def participation_ratio(powers: Float[np.ndarray, " n"]) -> float:
    """(sum v)^2 / sum v^2: n for n equal powers, 1 for a single one."""
    v = np.asarray(powers, np.float64)
    return float(v.sum() ** 2 / np.square(v).sum())


def entropy_dimension(powers: Float[np.ndarray, " n"]) -> float:
    """exp of the entropy of v / sum v, in nats; never below the participation ratio."""
    v = np.asarray(powers, np.float64)
    return _exp_entropy(v[v > 0] / v[v > 0].sum())


def _exp_entropy(share: Float[np.ndarray, " n"]) -> float:
    """exp(-sum p ln p) of shares that sum to one."""
    share = share[share > 0]
    return float(np.exp(-np.sum(share * np.log(share))))


def entropy_of_counts(counts: Int[np.ndarray, " n"]) -> float:
    """Bits per symbol of an ideal code for symbols that occur so often."""
    p = counts[counts > 0] / counts.sum()
    return float(-np.sum(p * np.log2(p)))
