"""How many dimensions a training run spans, beside a random walk, which looks low-dimensional to PCA, too.

Seen from its last point, a long walk of equal steps in many dimensions has squared singular values that fall as
1 / (2 i - 1)^2 and a participation ratio of 3 / 2; its steps are orthogonal, so that theirs is their number
(Antognini and Sohl-Dickstein, 1806.08805).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.study.figures import participation_ratio
from rdopt.study.manifold.tangent import slices
from rdopt.study.manifold.trajectory import Trajectory


class Dimensions(NamedTuple):
    """Gram matrices of every coded matrix: differences from the last checkpoint and steps, of the run and of a walk."""

    differences: Float[np.ndarray, "m p p"]
    steps: Float[np.ndarray, "m p p"]
    walk_differences: Float[np.ndarray, "m p p"]
    walk_steps: Float[np.ndarray, "m p p"]


def dimensions_of(run: Trajectory, seed: int) -> Dimensions:
    """The run beside a random walk with the length of every step in every matrix; the seed draws its directions."""
    differences = difference_grams(run.points, run.starts)
    steps, rng = step_grams(differences), np.random.default_rng((seed, 0))
    lengths = np.sqrt(np.maximum(np.diagonal(steps, axis1=1, axis2=2), 0))
    walk = np.array([sampled_step_gram(x, int(n), rng) for x, n in zip(lengths, run.sizes, strict=True)])
    return Dimensions(differences, steps, difference_gram_of_steps(walk), walk)


def difference_grams(points: Float[np.ndarray, "k N"], starts: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m p p"]:
    """Inner products of the p = k - 1 differences from the last point, matrix by matrix; their sum is the whole's."""
    parts = (points[:-1, place] - points[-1, place] for place in slices(starts, points.shape[1]))
    return np.array([D @ D.T for D in parts])


def step_grams(grams: Float[np.ndarray, "*m p p"]) -> Float[np.ndarray, "*m p p"]:
    """Inner products of the steps between neighbouring points, from those of the differences."""
    p = grams.shape[-1]
    B = np.eye(p, k=1) - np.eye(p)  # step t = difference t + 1 less difference t; the last point's is zero
    return B @ grams @ B.T


def difference_gram_of_steps(steps: Float[np.ndarray, "*m p p"]) -> Float[np.ndarray, "*m p p"]:
    """Inner products of the differences from the last point, from those of the steps: sums of later steps."""
    later = np.triu(np.ones(steps.shape[-2:]))  # the signs of both sides cancel
    return later @ steps @ later.T


def sampled_step_gram(
    lengths: Float[np.ndarray, " p"], dimension: int, rng: np.random.Generator
) -> Float[np.ndarray, "p p"]:
    """Inner products of steps of given lengths in random directions."""
    X = rng.standard_normal((len(lengths), dimension))
    X *= (lengths / np.linalg.norm(X, axis=1))[:, None]
    return X @ X.T


def powers(gram: Float[np.ndarray, "p p"]) -> Float[np.ndarray, " p"]:
    """Squared singular values of the vectors behind a Gram matrix, falling."""
    return np.maximum(np.linalg.eigvalsh(gram)[::-1], 0)


def gram_dimension(gram: Float[np.ndarray, "p p"]) -> float:
    """Participation ratio of the squared singular values, (tr G)^2 / tr G^2."""
    return participation_ratio(powers(gram))
