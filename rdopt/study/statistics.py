"""Outliers and concentration of one matrix in its present coordinates."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


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
    share = power.sum(axis=0) / power.sum()
    entropy = -float(np.sum(share[share > 0] * np.log(share[share > 0])))
    return WeightStatistics(
        rms=rms,
        peak=float(np.abs(W).max()) / rms,
        kurtosis=float(np.mean(power**2)) / mean**2,
        beyond_6_sigma=float(np.mean(np.abs(W) > 6 * rms)),
        effective_columns=float(np.exp(entropy)) / W.shape[1],
    )
