"""How unequal the columns, rows and singular values of a matrix are, and what that is worth to a coder in bits.

At high rate a coder that knows the variances v_j of its columns saves 1/2 log2 of the ratio of their arithmetic to
their geometric mean (Jayant and Noll, Digital Coding of Waveforms, 1984, ch. 12).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import digamma

from rdopt.study.figures import entropy_dimension, participation_ratio, weight_statistics

# A column below this share of the mean power costs no bits at the usual rates, so that being smaller saves none.
POWER_FLOOR = 0.05


class Spectra(NamedTuple):
    """Figures of one matrix in given coordinates.

    Attributes:
        column_gain, row_gain: bits/weight that the spread of the columns' and of the rows' powers saves at high rate.
        kurtosis: fourth moment over the squared second; 3 for a Gaussian.
        peak: largest magnitude over root mean square.
        columns: effective number of columns by the entropy of their powers, as a share of all.
        columns_pr: the same by the participation ratio.
        singular: effective number of squared singular values by entropy, as a share of the smaller side.
        singular_pr: the same by the participation ratio.
    """

    column_gain: float
    row_gain: float
    kurtosis: float
    peak: float
    columns: float
    columns_pr: float
    singular: float
    singular_pr: float


def spread_gain(powers: Float[np.ndarray, " n"], floor: float = POWER_FLOOR) -> float:
    """1/2 log2 of the arithmetic over the geometric mean of powers, bits.

    Args:
        powers: mean squares, not all zero.
        floor: added to every power, as a share of their mean.
    """
    v = np.asarray(powers, np.float64)
    v = v / v.mean() + floor
    return float(0.5 * (np.log2(v.mean()) - np.mean(np.log2(v))))


def chance_gain(rows: int) -> float:
    """What iid Gaussian columns of so many rows gain because their powers are measured, bits; no floor.

    The powers are chi^2 / rows, whose mean logarithm is psi(rows / 2) - ln(rows / 2).
    """
    return float(-0.5 * (digamma(rows / 2) - np.log(rows / 2)) / np.log(2))


def spectra(W: Float[np.ndarray, "out in"]) -> Spectra:
    """All figures of a matrix that is not zero, float64."""
    W = np.asarray(W, np.float64)
    power, plain = np.square(W), weight_statistics(W)
    columns = power.mean(axis=0)
    values = np.maximum(np.linalg.eigvalsh(W @ W.T if W.shape[0] < W.shape[1] else W.T @ W), 0)
    return Spectra(
        column_gain=spread_gain(columns),
        row_gain=spread_gain(power.mean(axis=1)),
        kurtosis=plain.kurtosis,
        peak=plain.peak,
        columns=plain.effective_columns,
        columns_pr=participation_ratio(columns) / len(columns),
        singular=entropy_dimension(values) / len(values),
        singular_pr=participation_ratio(values) / len(values),
    )
