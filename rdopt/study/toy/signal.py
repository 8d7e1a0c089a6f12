"""Sums of sinusoids, how well something reproduces them, and their coefficients in a real Fourier basis on [0, 1).

The domain is one period of the basis but not of the signal: a frequency between two of the basis leaks into all of
them, with amplitudes that fall with one over the distance.
"""

from bisect import bisect_left
from math import log10
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.linalg import lstsq

_AMPLITUDES = (0.3, 1.0)
_SLOWEST = 1.0  # cycles over the domain


class Sinusoids(NamedTuple):
    """sum_m a_m cos(2 pi f_m x + p_m), float64: amplitudes a, cycles f over the domain [0, 1), phases p in radians."""

    amplitudes: Float[np.ndarray, " m"]
    cycles: Float[np.ndarray, " m"]
    phases: Float[np.ndarray, " m"]

    def at(self, x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The sum at the places x."""
        return np.cos(2 * np.pi * x[:, None] * self.cycles + self.phases) @ self.amplitudes


def draw_sinusoids(rng: np.random.Generator, count: int, cycles: float) -> Sinusoids:
    """`count` sinusoids; amplitudes, frequencies and phases uniform, frequencies real and so off any grid."""
    return Sinusoids(
        rng.uniform(*_AMPLITUDES, count), rng.uniform(_SLOWEST, cycles, count), rng.uniform(0, 2 * np.pi, count)
    )


def cell_middles(samples: int) -> Float[np.ndarray, " n"]:
    """The middles of equal cells of [0, 1)."""
    return (np.arange(samples) + 0.5) / samples


def unit_power(y: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The samples over their root mean square."""
    return y / np.sqrt(np.mean(y**2))


def noise_power(y: Float[np.ndarray, " n"], decoded: Float[np.ndarray, " n"]) -> float:
    """sum (y - decoded)^2 / sum y^2, float64."""
    return float(np.sum((np.asarray(y, np.float64) - decoded) ** 2) / np.sum(np.square(y, dtype=np.float64)))


def decibels(noise: float) -> float:
    """Signal-to-noise ratio of a relative noise power in dB; infinite without noise."""
    return float("inf") if noise == 0 else -10 * log10(noise)


def snr(y: Float[np.ndarray, " n"], decoded: Float[np.ndarray, " n"]) -> float:
    """Signal-to-noise ratio 10 log10(sum y^2 / sum (y - decoded)^2) in dB."""
    return decibels(noise_power(y, decoded))


def fourier_basis(x: Float[np.ndarray, " n"], harmonics: int) -> Float[np.ndarray, "n c"]:
    """1, sqrt2 cos 2 pi x, sqrt2 sin 2 pi x, sqrt2 cos 4 pi x, ...: c = 2 harmonics + 1 columns of unit power."""
    angles = 2 * np.pi * x[:, None] * np.arange(1, harmonics + 1)
    waves = np.sqrt(2) * np.stack([np.cos(angles), np.sin(angles)], axis=2)
    return np.concatenate([np.ones((len(x), 1)), waves.reshape(len(x), -1)], axis=1)


def fit_fourier(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], harmonics: int) -> Float[np.ndarray, " c"]:
    """The coefficients with the least squared error, float64."""
    # QR: several times faster than the SVD
    solution: Any = lstsq(fourier_basis(x, harmonics), y, lapack_driver="gelsy")
    return solution[0]


def fit_to_snr(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], least: float) -> Float[np.ndarray, " c"]:
    """The fit with the fewest harmonics that reaches an SNR of `least` dB.

    Where none does, the one with the most harmonics that n samples determine, (n - 1) // 2.
    """
    most = (len(x) - 1) // 2

    def reaches(harmonics: int) -> bool:
        return snr(y, fourier_basis(x, harmonics) @ fit_fourier(x, y, harmonics)) >= least

    # The error never rises with the harmonics, so that bisection finds the first.
    return fit_fourier(x, y, bisect_left(range(most), True, key=reaches))
