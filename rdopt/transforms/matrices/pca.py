"""Principal axes of a second moment (Karhunen-Loeve): columns by falling variance, signs fixed."""

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

from rdopt.transforms.arrays import AnyArray, namespace


def spectrum(
    gram: Float[AnyArray, "*batch n n"],
) -> tuple[Float[AnyArray, "*batch n"], Float[AnyArray, "*batch n n"]]:
    """Eigenvalues, falling, and orthonormal eigenvectors (columns) of the symmetric part of ``gram``.

    Each column's entry of largest magnitude is positive.
    """
    xp = namespace(gram)
    values, vectors = xp.linalg.eigh((gram + gram.swapaxes(-1, -2)) / 2)
    values, vectors = values[..., ::-1], vectors[..., ::-1]
    peak = xp.argmax(xp.abs(vectors), axis=-2)[..., None, :]
    sign = xp.where(xp.take_along_axis(vectors, peak, axis=-2) < 0, -1.0, 1.0).astype(gram.dtype)
    return values, vectors * sign


def pca(gram: Float[AnyArray, "*batch n n"]) -> Float[AnyArray, "*batch n n"]:
    """Basis Q with Q^T gram Q diagonal and falling; rows x are expressed in it as x Q."""
    return spectrum(gram)[1]


def near_identity(V: Float[np.ndarray, "k b b"]) -> Float[np.ndarray, "k b b"]:
    """The columns in the order with the largest diagonal: their order is free, small angles are cheap."""
    return np.stack([v[:, linear_sum_assignment(-(v**2))[1]] for v in V])
