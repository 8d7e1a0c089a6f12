"""How concentrated coefficients are, how far their outliers reach, and their entropy on a grid."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from rdopt.study.figures import entropy_dimension, entropy_of_counts, participation_ratio

_TOPS = (1, 5, 10, 25)  # percent of the coefficients
_FAR = 6.0  # root mean squares


class CoefficientFigures(NamedTuple):
    """Figures of all coefficients of a representation.

    Energies are those of the coefficients in steps, so that they count by what an error of theirs costs; outliers
    are relative to the root mean square of their own matrix, the reach of a rotation.

    Attributes:
        coefficients: how many.
        top: percent -> share of the energy in that many percent of the coefficients, the largest first.
        participation: (sum e)^2 / sum e^2 of the energies e: how many equal ones would be as concentrated.
        entropy_dimension: exp of the entropy of the energies' shares, another such number.
        kurtosis: fourth moment over the squared second; 3 for a Gaussian.
        peak: largest magnitude in root mean squares.
        beyond_6_sigma: share of the coefficients larger than six root mean squares.
        entropy: of the rounded coefficients, all taken as one source, bits/coefficient.
    """

    coefficients: int
    top: dict[int, float]
    participation: float
    entropy_dimension: float
    kurtosis: float
    peak: float
    beyond_6_sigma: float
    entropy: float


def coefficient_figures(
    arrays: Sequence[Float[np.ndarray, "_ _"]], steps: Float[np.ndarray, " k"]
) -> CoefficientFigures:
    """The figures of some matrices.

    Args:
        arrays: coefficients; at least one is not zero.
        steps: of every matrix, in its units.
    """
    x = np.concatenate([np.ravel(W) / step for W, step in zip(arrays, steps, strict=True)]).astype(np.float64)
    r = np.concatenate([over_rms(W) for W in arrays])
    return CoefficientFigures(
        coefficients=len(x),
        top={percent: top_share(x, percent / 100) for percent in _TOPS},
        participation=participation_ratio(x**2),
        entropy_dimension=entropy_dimension(x**2),
        kurtosis=float(np.mean(r**4) / np.mean(r**2) ** 2),
        peak=float(np.abs(r).max()),
        beyond_6_sigma=float(np.mean(np.abs(r) > _FAR)),
        entropy=index_entropy(x),
    )


def over_rms(W: Float[np.ndarray, "_ _"]) -> Float[np.ndarray, " n"]:
    """The entries over the root mean square of their matrix; zeros for a zero matrix."""
    flat = np.ravel(np.asarray(W, np.float64))
    rms = np.sqrt(np.mean(flat**2))
    return flat / rms if rms > 0 else flat


def energy_curve(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Share of the energy in the 1, 2, ..., n largest coefficients."""
    falling = np.sort(np.square(x, dtype=np.float64))[::-1]
    return np.cumsum(falling) / np.sum(falling)


def top_share(x: Float[np.ndarray, " n"], part: float) -> float:
    """Share of the energy in the largest `part` of the coefficients, linear between whole numbers of them."""
    return float(np.interp(part * len(x), np.arange(len(x) + 1), np.concatenate([[0.0], energy_curve(x)])))


def index_entropy(x: Float[np.ndarray, " n"]) -> float:
    """Empirical entropy of coefficients rounded to whole steps, bits each."""
    return entropy_of_counts(np.unique(np.rint(x), return_counts=True)[1])
