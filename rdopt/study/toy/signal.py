"""Sums of sinusoids with random amplitude, frequency and phase, and how well something reproduces them."""

from math import log10
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

_AMPLITUDES = (0.3, 1.0)
_SLOWEST = 1.0  # cycles over the domain


class Sinusoids(NamedTuple):
    """sum_m a_m cos(2 pi f_m x + p_m), float64.

    Attributes:
        amplitudes: a.
        cycles: f over the domain [0, 1).
        phases: p in radians.
    """

    amplitudes: Float[np.ndarray, " m"]
    cycles: Float[np.ndarray, " m"]
    phases: Float[np.ndarray, " m"]

    def at(self, x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The sum at the places x."""
        return np.cos(2 * np.pi * x[:, None] * self.cycles + self.phases) @ self.amplitudes


def draw(rng: np.random.Generator, count: int, cycles: float) -> Sinusoids:
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


def noise_power(y: Float[np.ndarray, " n"], found: Float[np.ndarray, " n"]) -> float:
    """sum (y - found)^2 / sum y^2, float64."""
    return float(np.sum((np.asarray(y, np.float64) - found) ** 2) / np.sum(np.square(y, dtype=np.float64)))


def decibels(noise: float) -> float:
    """Signal-to-noise ratio of a relative noise power in dB; infinite without noise."""
    return float("inf") if noise == 0 else -10 * log10(noise)


def snr(y: Float[np.ndarray, " n"], found: Float[np.ndarray, " n"]) -> float:
    """Signal-to-noise ratio 10 log10(sum y^2 / sum (y - found)^2) in dB."""
    return decibels(noise_power(y, found))
