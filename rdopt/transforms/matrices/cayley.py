"""Cayley transform Q = (I + S)^-1 (I - S) of a skew matrix S: dense, and in blocks along the diagonal.

Every leading axis is a batch (layers, heads). Numpy in, numpy out; jax in, jax out. Zero parameters give the
identity; rotations with an eigenvalue -1 are out of reach, so training starts on a basis Q0 and learns Q0 Q.
"""

import numpy as np
from jaxtyping import Float

from rdopt.transforms.arrays import AnyArray, namespace


def skew_size(n: int) -> int:
    """Number of free entries of an n x n skew matrix, n (n - 1) / 2."""
    return n * (n - 1) // 2


def skew(theta: Float[AnyArray, "*batch m"], n: int) -> Float[AnyArray, "*batch n n"]:
    """Skew matrix S = -S^T whose strict upper triangle, row by row, is ``theta``.

    Raises:
        ValueError: when theta does not hold n (n - 1) / 2 entries.
    """
    if theta.shape[-1] != skew_size(n):
        raise ValueError(f"a skew {n} x {n} matrix takes {skew_size(n)} parameters, got {theta.shape[-1]}")
    xp = namespace(theta)
    i, j = xp.arange(n)[:, None], xp.arange(n)
    low, high = xp.minimum(i, j), xp.maximum(i, j)
    # Gathered by computed indices: XLA spends minutes on a scatter by constant ones at a width of 512.
    place = xp.where(i == j, skew_size(n), low * n - low * (low + 1) // 2 + high - low - 1)
    padded = xp.concatenate([theta, xp.zeros((*theta.shape[:-1], 1), theta.dtype)], axis=-1)
    sign = xp.sign(j - i).astype(theta.dtype).reshape((1,) * (theta.ndim - 1) + (n, n))
    return sign * xp.take(padded, place, axis=-1, mode="clip")


def upper(X: Float[AnyArray, "*batch n n"]) -> Float[AnyArray, "*batch m"]:
    """The strict upper triangle, row by row."""
    rows, columns = np.triu_indices(X.shape[-1], 1)
    if isinstance(X, np.ndarray):
        return X[..., rows, columns]
    return X.at[..., rows, columns].get(mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True)


def cayley(theta: Float[AnyArray, "*batch m"], n: int) -> Float[AnyArray, "*batch n n"]:
    """Orthogonal Q = (I + S)^-1 (I - S) = 2 (I + S)^-1 - I, S = skew(theta), by one LU factorisation.

    I + S is never singular (its eigenvalues are 1 + i t); the rounding error of Q grows like |S|.
    """
    if not isinstance(theta, np.ndarray):
        from rdopt.transforms.matrices.gradients import trained_cayley

        return trained_cayley(theta, n)
    S = skew(theta, n)
    eye = np.eye(n, dtype=theta.dtype)
    return np.linalg.solve(eye + S, eye - S)


def block_skew_size(n: int, block: int) -> int:
    """Free entries of a block-diagonal skew matrix of width n; the last block may be smaller."""
    full, rest = divmod(n, block)
    return full * skew_size(block) + skew_size(rest)


def block_cayley(theta: Float[AnyArray, "*batch p"], n: int, block: int) -> tuple[AnyArray, AnyArray]:
    """The diagonal blocks: (*batch, n // block, block, block) and the smaller last one (*batch, rest, rest)."""
    full, rest = divmod(n, block)
    cut = full * skew_size(block)
    body = theta[..., :cut].reshape(*theta.shape[:-1], full, skew_size(block))
    return cayley(body, block), cayley(theta[..., cut:], rest)
