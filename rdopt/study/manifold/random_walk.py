"""What a random walk looks like to PCA: low-dimensional, too (Antognini and Sohl-Dickstein, 1806.08805).

Seen from its last point, a long walk of equal steps in many dimensions has squared singular values that fall as
1 / (2 i - 1)^2 and a participation ratio of 3 / 2; its steps are orthogonal, so that theirs is their number.
"""

import numpy as np
from jaxtyping import Float, Int


def sampled_step_gram(
    lengths: Float[np.ndarray, " p"], dimension: int, rng: np.random.Generator
) -> Float[np.ndarray, "p p"]:
    """Inner products of steps of given lengths in random directions."""
    X = rng.standard_normal((len(lengths), dimension))
    X *= (lengths / np.linalg.norm(X, axis=1))[:, None]
    return X @ X.T


def difference_gram_of_steps(steps: Float[np.ndarray, "*m p p"]) -> Float[np.ndarray, "*m p p"]:
    """Inner products of the differences from the last point, from those of the steps: sums of later steps."""
    p = steps.shape[-1]
    later = np.triu(np.ones((p, p)))  # the signs of both sides cancel
    return later @ steps @ later.T


def sampled_step_grams(
    steps: Float[np.ndarray, "m p p"], sizes: Int[np.ndarray, " m"], rng: np.random.Generator
) -> Float[np.ndarray, "m p p"]:
    """A walk with the lengths that every step of a trajectory has in every matrix, but random directions.

    Args:
        steps: inner products of the trajectory's steps.
        sizes: entries of each matrix.
        rng: source of the directions.
    """
    lengths = np.sqrt(np.maximum(np.diagonal(steps, axis1=1, axis2=2), 0))
    return np.array([sampled_step_gram(x, int(n), rng) for x, n in zip(lengths, sizes, strict=True)])
