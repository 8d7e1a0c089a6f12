"""Orthogonal matrices drawn uniformly (Haar): QR of a Gaussian with the signs of R undone (Mezzadri 2007)."""

import numpy as np
from jaxtyping import Float


def random_orthogonal(seed: int, n: int, batch: tuple[int, ...] = ()) -> Float[np.ndarray, "*batch n n"]:
    """Independent Haar-distributed float64 orthogonal matrices, the same for the same seed, n and batch."""
    gaussian = np.random.default_rng(seed).standard_normal((*batch, n, n))
    Q, R = np.linalg.qr(gaussian)
    diagonal = np.diagonal(R, axis1=-2, axis2=-1)
    return Q * np.where(diagonal < 0, -1.0, 1.0)[..., None, :]
