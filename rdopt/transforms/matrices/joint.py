"""The axes that rows of several matrices want together, each row with a scale of its own: a start for learning."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from rdopt.transforms.matrices.jacobi import joint_diagonalizer
from rdopt.transforms.matrices.pca import pca

# Added to every moment before its logarithm counts, as a share of its mean diagonal: a column below this power costs no
# bits at the usual rates, so that making it smaller still must not pay.
FLOOR = 0.05


def row_moments(
    matrices: Iterable[Iterable[Float[np.ndarray, "_ n"]]], floor: float = FLOOR
) -> tuple[Float[np.ndarray, "k n n"], Float[np.ndarray, " k"]]:
    """What `joint_cost` judges a basis by.

    Rows count alike, as they do where each has its own step and spread.

    Args:
        matrices: k pools of matrices (rows, n) that share an input, taken one at a time; a pool has one moment.
        floor: added to the diagonal, as a share of its mean.

    Returns:
        (C, weights): second moments of the rows, each row of norm one, float64, and the numbers of rows.
    """
    moments, weights = zip(*map(_pooled, matrices), strict=True)
    C = np.array(moments)
    n = C.shape[1]
    C += floor * np.trace(C, axis1=1, axis2=2)[:, None, None] / n * np.eye(n)
    return C, np.array(weights)


def _pooled(pool: Iterable[Float[np.ndarray, "_ n"]]) -> tuple[Float[np.ndarray, "n n"], float]:
    """Mean of x x^T over all rows, each of norm one, and their number."""
    grams, rows = [], 0
    for W in pool:
        X = W / np.maximum(np.linalg.norm(W, axis=1, keepdims=True), 1e-30)
        grams, rows = [sum(grams, X.T @ X)], rows + len(X)
    return grams[0] / rows, float(rows)


def joint_axes(matrices: Iterable[Iterable[Float[np.ndarray, "_ n"]]]) -> Float[np.ndarray, "n n"]:
    """The joint diagonaliser of `row_moments`, from their mean's PCA."""
    C, weights = row_moments(matrices)
    return joint_diagonalizer(C, weights, start=pca(np.einsum("k,kij->ij", weights, C)))
