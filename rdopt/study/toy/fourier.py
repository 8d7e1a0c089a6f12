"""A real Fourier basis on [0, 1) and its least-squares coefficients.

The domain is one period of the basis but not of the signal: a frequency between two of the basis leaks into all of
them, with amplitudes that fall with one over the distance.
"""

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.linalg import lstsq

from rdopt.study.toy.signal import snr


def fourier_basis(x: Float[np.ndarray, " n"], harmonics: int) -> Float[np.ndarray, "n c"]:
    """1, sqrt2 cos 2 pi x, sqrt2 sin 2 pi x, sqrt2 cos 4 pi x, ...: c = 2 harmonics + 1 columns of unit power."""
    angles = 2 * np.pi * x[:, None] * np.arange(1, harmonics + 1)
    waves = np.sqrt(2) * np.stack([np.cos(angles), np.sin(angles)], axis=2)
    return np.concatenate([np.ones((len(x), 1)), waves.reshape(len(x), -1)], axis=1)


def fit_fourier(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], harmonics: int) -> Float[np.ndarray, " c"]:
    """The coefficients with the least squared error, float64."""
    found: Any = lstsq(fourier_basis(x, harmonics), y, lapack_driver="gelsy")  # QR: several times faster than the SVD
    return found[0]


def fit_to_snr(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], least: float) -> Float[np.ndarray, " c"]:
    """The fit with the fewest harmonics that reaches an SNR of `least` dB.

    Where none does, the one with the most harmonics that n samples determine, (n - 1) // 2.
    """
    most = (len(x) - 1) // 2
    low, high = 0, most  # the error never rises with the harmonics, so that bisection finds the first
    while low < high:
        middle = (low + high) // 2
        reached = snr(y, fourier_basis(x, middle) @ fit_fourier(x, y, middle)) >= least
        low, high = (low, middle) if reached else (middle + 1, high)
    return fit_fourier(x, y, low)
