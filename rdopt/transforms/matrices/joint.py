"""The axes that rows of several matrices want together, each row with a scale of its own: a start for learning."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from rdopt.transforms.matrices.jacobi import joint_diagonalizer
from rdopt.transforms.matrices.pca import pca

# Added to every moment before its logarithm counts, as a share of its mean diagonal: a column below this power costs no
# bits at the usual rates, so that making it smaller still must not pay.
FLOOR = 0.05


def row_moments(
    matrices: Sequence[Float[np.ndarray, "_ n"]], floor: float = FLOOR
) -> tuple[Float[np.ndarray, "k n n"], Float[np.ndarray, " k"]]:
    """What `joint_cost` judges a basis by.

    Rows count alike, as they do where each has its own step and spread.

    Args:
        matrices: that share an input, (rows, n).
        floor: added to the diagonal, as a share of its mean.

    Returns:
        (C, weights): second moments of the rows, each row of norm one, float64, and the numbers of rows.
    """
    unit = [W / np.maximum(np.linalg.norm(W, axis=1, keepdims=True), 1e-30) for W in matrices]
    C = np.array([X.T @ X / len(X) for X in unit])
    n = C.shape[1]
    C += floor * np.trace(C, axis1=1, axis2=2)[:, None, None] / n * np.eye(n)
    return C, np.array([float(len(X)) for X in unit])


def joint_axes(matrices: Sequence[Float[np.ndarray, "_ n"]]) -> Float[np.ndarray, "n n"]:
    """The joint diagonaliser of the second moments of the rows, each row of norm one, from their mean's PCA."""
    C, weights = row_moments(matrices)
    return joint_diagonalizer(C, weights, start=pca(np.einsum("k,kij->ij", weights, C)))
