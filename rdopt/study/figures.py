"""Figures of matrices in their present coordinates: outliers, entropy, and how unequally their energy is spread.

Effective dimensions: participation ratio (sum v)^2 / sum v^2, and the exponential of the entropy of v / sum v (Roy and
Vetterli 2007).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

TOPS = (1, 5, 10, 25)  # percent of the coefficients whose energy share is given


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


def coefficient_figures(arrays: Sequence[Float[np.ndarray, "_ _"]], steps: Float[np.ndarray, " k"]) -> dict[str, Any]:
    """The figures of all coefficients of a representation.

    Energies are those of the coefficients in steps, so that they count by what an error of theirs costs; outliers
    are relative to the root mean square of their own matrix, the reach of a rotation.

    Args:
        arrays: coefficients; at least one is not zero.
        steps: of every matrix, in its units.

    Returns:
        {"coefficients": how many, "top": {percent: share of the energy in that many percent of them, the largest
        first}, "participation" and "entropy_dimension": how many equal ones would be as concentrated, "kurtosis",
        "peak" and "beyond_6_sigma" as in `WeightStatistics`, "entropy": of the coefficients
        rounded to whole steps, all taken as one source, bits each}.
    """
    x = in_steps(arrays, steps)
    flat = [np.ravel(np.asarray(W, np.float64)) for W in arrays]
    rms = [np.sqrt(np.mean(W**2)) for W in flat]
    r = np.concatenate([W / own if own > 0 else W for W, own in zip(flat, rms, strict=True)])
    below = np.concatenate([[0.0], energy_curve(x)])  # in the 0, 1, ..., n largest
    return {
        "coefficients": len(x),
        "top": {k: float(np.interp(k / 100 * len(x), np.arange(len(x) + 1), below)) for k in TOPS},
        "participation": participation_ratio(x**2),
        "entropy_dimension": entropy_dimension(x**2),
        "kurtosis": float(np.mean(r**4) / np.mean(r**2) ** 2),
        "peak": float(np.abs(r).max()),
        "beyond_6_sigma": float(np.mean(np.abs(r) > 6)),
        "entropy": entropy_of_counts(np.unique(np.rint(x), return_counts=True)[1]),
    }


def in_steps(arrays: Sequence[Float[np.ndarray, "_ _"]], steps: Float[np.ndarray, " k"]) -> Float[np.ndarray, " n"]:
    """All coefficients over the step of their matrix, float64."""
    return np.concatenate([np.ravel(W) / step for W, step in zip(arrays, steps, strict=True)]).astype(np.float64)


def energy_curve(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Share of the energy in the 1, 2, ..., n largest coefficients."""
    falling = np.sort(np.square(x, dtype=np.float64))[::-1]
    return np.cumsum(falling) / np.sum(falling)
