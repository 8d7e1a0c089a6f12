"""How concentrated coefficients are, how far their outliers reach, and their entropy on a grid."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rdopt.study.figures import entropy_dimension, entropy_of_counts, participation_ratio

TOPS = (1, 5, 10, 25)  # percent of the coefficients
_FAR = 6.0  # root mean squares


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
        "peak" and "beyond_6_sigma" as in `rdopt.study.figures.WeightStatistics`, "entropy": of the coefficients
        rounded to whole steps, all taken as one source, bits each}.
    """
    x = in_steps(arrays, steps)
    r = np.concatenate([_over_rms(W) for W in arrays])
    below = np.concatenate([[0.0], energy_curve(x)])  # in the 0, 1, ..., n largest
    return {
        "coefficients": len(x),
        "top": {k: float(np.interp(k / 100 * len(x), np.arange(len(x) + 1), below)) for k in TOPS},
        "participation": participation_ratio(x**2),
        "entropy_dimension": entropy_dimension(x**2),
        "kurtosis": float(np.mean(r**4) / np.mean(r**2) ** 2),
        "peak": float(np.abs(r).max()),
        "beyond_6_sigma": float(np.mean(np.abs(r) > _FAR)),
        "entropy": entropy_of_counts(np.unique(np.rint(x), return_counts=True)[1]),
    }


def in_steps(arrays: Sequence[Float[np.ndarray, "_ _"]], steps: Float[np.ndarray, " k"]) -> Float[np.ndarray, " n"]:
    """All coefficients over the step of their matrix, float64."""
    return np.concatenate([np.ravel(W) / step for W, step in zip(arrays, steps, strict=True)]).astype(np.float64)


def _over_rms(W: Float[np.ndarray, "_ _"]) -> Float[np.ndarray, " n"]:
    """The entries over the root mean square of their matrix; zeros for a zero matrix."""
    flat = np.ravel(np.asarray(W, np.float64))
    rms = np.sqrt(np.mean(flat**2))
    return flat / rms if rms > 0 else flat


def energy_curve(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Share of the energy in the 1, 2, ..., n largest coefficients."""
    falling = np.sort(np.square(x, dtype=np.float64))[::-1]
    return np.cumsum(falling) / np.sum(falling)
