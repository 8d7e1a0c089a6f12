"""Orthonormal frequency bases of any width: the cosine transform DCT-II (Ahmed et al. 1974) and the real Fourier basis.

Columns are modes from slow to fast, so that x @ basis are a row's coefficients. Both are fixed by the order of the
channels, which a trained network has no reason to choose smooth.
"""

import numpy as np
from jaxtyping import Float


def dct(n: int) -> Float[np.ndarray, "n n"]:
    """Column k is sqrt((2 - [k = 0]) / n) cos(pi (j + 1/2) k / n) over j, float64."""
    place, mode = np.arange(n), np.arange(n)
    # An integer phase modulo the period 4 n keeps the cosine's argument small and the basis orthonormal at any width.
    modes = np.cos(np.pi * (np.outer(2 * place + 1, mode) % (4 * n)) / (2 * n))
    return modes * np.sqrt(np.where(mode == 0, 1.0, 2.0) / n)


def fourier(n: int) -> Float[np.ndarray, "n n"]:
    """Columns are 1, then cos and sin of 2 pi j k / n for k = 1, 2, ..., and (-1)^j where n is even, of norm one."""
    place, column = np.arange(n), np.arange(n)
    frequency = (column + 1) // 2
    phase = 2 * np.pi * (np.outer(place, frequency) % n) / n
    modes = np.where((column > 0) & (column % 2 == 0), np.sin(phase), np.cos(phase))
    alone = (frequency == 0) | (2 * frequency == n)
    return modes * np.sqrt(np.where(alone, 1.0, 2.0) / n)
