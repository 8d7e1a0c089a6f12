"""Principal axes of a second moment (Karhunen-Loeve): columns by falling variance, signs fixed."""

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

from rdopt.transforms.arrays import AnyArray, namespace


def pca(gram: Float[AnyArray, "*batch n n"]) -> Float[AnyArray, "*batch n n"]:
    """Basis Q, orthonormal columns, with Q^T gram Q of the symmetric part diagonal and falling; rows become x Q.

    Each column's entry of largest magnitude is positive.
    """
    xp = namespace(gram)
    Q = xp.linalg.eigh((gram + gram.swapaxes(-1, -2)) / 2)[1][..., ::-1]
    peak = xp.argmax(xp.abs(Q), axis=-2)[..., None, :]
    return Q * xp.where(xp.take_along_axis(Q, peak, axis=-2) < 0, -1.0, 1.0).astype(gram.dtype)


def near_identity(V: Float[np.ndarray, "k b b"]) -> Float[np.ndarray, "k b b"]:
    """The columns in the order with the largest diagonal: their order is free, small angles are cheap."""
    return np.stack([v[:, linear_sum_assignment(-(v**2))[1]] for v in V])
