"""The tangent J of W ~ W0 + J theta from points of a trajectory, and noise of equal norm along it and across it.

J is an orthonormal basis of the differences of the points from the last one, by the eigenvectors of their small Gram
matrix. A vector of parameters is the concatenation of the matrices of a network; `starts` says where each one begins.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

# Singular values below this share of the largest are rounding errors of the Gram matrix, whose square is 1e-12.
RELATIVE = 1e-6
Random = np.random.Generator


def tangent(points: Float[np.ndarray, "k N"]) -> Float[np.ndarray, "N d"]:
    """J, the span of the differences of all points from the last one: J^T J = 1, by falling singular values, float64.

    Raises:
        ValueError: all points are alike.
    """
    D = (points[:-1] - points[-1]).T
    squares, V = np.linalg.eigh(D.T @ D)
    singular = np.sqrt(np.maximum(squares[::-1], 0))
    spans = singular > RELATIVE * singular[0]
    if not spans.any():
        raise ValueError("all points are alike")
    J = D @ (V[:, ::-1][:, spans] / singular[spans])
    Q, R = np.linalg.qr(J)  # the Gram matrix squares the condition; this restores orthogonality
    return Q * np.sign(np.diag(R))


def slices(starts: Int[np.ndarray, " m"], N: int) -> Iterator[slice]:
    """The place of each matrix in a vector of N parameters."""
    for low, high in zip(starts, [*starts[1:], N], strict=True):
        yield slice(int(low), int(high))


def norms(x: Float[np.ndarray, "N *rest"], starts: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m *rest"]:
    """Frobenius norm of each matrix."""
    return np.sqrt(np.add.reduceat(np.square(x), starts, axis=0))


def with_norms(
    x: Float[np.ndarray, "N *rest"], target: Float[np.ndarray, "m *rest"], starts: Int[np.ndarray, " m"]
) -> Float[np.ndarray, "N *rest"]:
    """A vector whose matrices are scaled to given norms; one of norm zero stays zero."""
    have = norms(x, starts)
    scale = np.divide(target, have, out=np.zeros_like(have), where=have > 0)
    return x * np.repeat(scale, np.diff([*starts, len(x)]), axis=0)


def along(J: Float[np.ndarray, "N d"], rng: Random) -> Float[np.ndarray, " N"]:
    """J theta with theta uniform on the unit sphere."""
    theta = rng.standard_normal(J.shape[1])
    return J @ (theta / np.linalg.norm(theta))


def matrix_bases(J: Float[np.ndarray, "N d"], starts: Int[np.ndarray, " m"]) -> list[Float[np.ndarray, "n d"]]:
    """For every matrix an orthonormal basis of what J does to it.

    Raises:
        ValueError: a matrix has no entries beside that many directions.
    """
    parts = [J[place] for place in slices(starts, len(J))]
    if min(map(len, parts)) <= J.shape[1]:
        raise ValueError("a matrix must have more entries than the tangent has directions")
    return [np.linalg.qr(part)[0] for part in parts]


def across(
    bases: Sequence[Float[np.ndarray, "n d"]],
    like: Float[np.ndarray, " N"],
    starts: Int[np.ndarray, " m"],
    rng: Random,
) -> Float[np.ndarray, " N"]:
    """Gaussian noise without component in J whose every matrix has the norm that it has in `like`, noise along J.

    Each matrix is made orthogonal to its own part of J (`matrix_bases`), so that scaling matrices leaves the whole
    orthogonal to J.
    """
    x = rng.standard_normal(len(like))
    for Q, place in zip(bases, slices(starts, len(like)), strict=True):
        x[place] = _without(Q, x[place])
    return with_norms(x, norms(like, starts), starts)


def across_in_total(J: Float[np.ndarray, "N d"], rng: Random) -> Float[np.ndarray, " N"]:
    """Gaussian noise orthogonal to J of norm one, whichever matrices it falls on."""
    x = _without(J, rng.standard_normal(len(J)))
    return x / np.linalg.norm(x)


def rotated_at_random(
    x: Float[np.ndarray, " N"], shapes: Sequence[tuple[int, int]], starts: Int[np.ndarray, " m"], rng: Random
) -> Float[np.ndarray, " N"]:
    """Every matrix between random rotations of its outputs and inputs: its singular values stay, its vectors do not."""
    out = np.empty_like(x)
    for (rows, columns), place in zip(shapes, slices(starts, len(x)), strict=True):
        U, V = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (rows, columns))
        out[place] = (U @ x[place].reshape(rows, columns) @ V).ravel()
    return out


def random_tangent(
    J: Float[np.ndarray, "N d"], starts: Int[np.ndarray, " m"], rng: Random
) -> Float[np.ndarray, "N d"]:
    """An orthonormal basis of random directions, each with the norms per matrix that J's has: a control."""
    return np.linalg.qr(with_norms(rng.standard_normal(J.shape), norms(J, starts), starts))[0]


def _without(Q: Float[np.ndarray, "n d"], x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """x less its projection on orthonormal columns, twice against rounding."""
    x = x - Q @ (Q.T @ x)
    return x - Q @ (Q.T @ x)
