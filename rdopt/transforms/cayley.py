"""Cayley transform Q = (I + S)^-1 (I - S) of a skew matrix S: dense, and in blocks along the diagonal.

Every leading axis is a batch (layers, heads). Numpy in, numpy out; jax in, jax out. Zero parameters give the
identity; rotations with an eigenvalue -1 are out of reach, so training starts on a basis Q0 and learns Q0 Q.
"""

import numpy as np
from jaxtyping import Float

from rdopt.transforms.arrays import AnyArray, eye_like, matmul, namespace


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
    rows, columns = np.triu_indices(n, 1)
    shape = (*theta.shape[:-1], n, n)
    if isinstance(theta, np.ndarray):
        upper = np.zeros(shape, theta.dtype)
        upper[..., rows, columns] = theta
    else:
        upper = namespace(theta).zeros(shape, theta.dtype).at[..., rows, columns].set(theta)
    return upper - upper.swapaxes(-1, -2)


def cayley(theta: Float[AnyArray, "*batch m"], n: int) -> Float[AnyArray, "*batch n n"]:
    """Orthogonal Q = (I + S)^-1 (I - S), S = skew(theta), by one LU solve.

    I + S is never singular (its eigenvalues are 1 + i t); the rounding error of Q grows like |S|.
    """
    S = skew(theta, n)
    eye = eye_like(theta, (), n).reshape((1,) * (S.ndim - 2) + (n, n))
    return namespace(theta).linalg.solve(eye + S, eye - S)


def inverse_cayley(Q: Float[AnyArray, "*batch n n"]) -> Float[AnyArray, "*batch m"]:
    """Parameters theta with cayley(theta) = Q, a Q without eigenvalue -1 (the transform is an involution)."""
    n = Q.shape[-1]
    eye = eye_like(Q, (), n).reshape((1,) * (Q.ndim - 2) + (n, n))
    S = namespace(Q).linalg.solve(eye + Q, eye - Q)
    rows, columns = np.triu_indices(n, 1)
    return S[..., rows, columns]


def block_cayley_size(n: int, block: int) -> int:
    """Number of parameters of a block-diagonal Cayley transform of width n; the last block may be smaller."""
    full, rest = divmod(n, block)
    return full * skew_size(block) + skew_size(rest)


def block_cayley_blocks(theta: Float[AnyArray, "*batch p"], n: int, block: int) -> tuple[AnyArray, AnyArray]:
    """The diagonal blocks: (*batch, n // block, block, block) and the smaller last one (*batch, rest, rest).

    Raises:
        ValueError: when theta does not hold block_cayley_size(n, block) entries.
    """
    if theta.shape[-1] != block_cayley_size(n, block):
        need = block_cayley_size(n, block)
        raise ValueError(f"blocks of {block} in width {n} take {need} parameters, got {theta.shape[-1]}")
    full, rest = divmod(n, block)
    cut = full * skew_size(block)
    body = theta[..., :cut].reshape(*theta.shape[:-1], full, skew_size(block))
    return cayley(body, block), cayley(theta[..., cut:], rest)


def apply_block_cayley(
    x: Float[AnyArray, "*batch rows n"], theta: Float[AnyArray, "*batch p"], block: int
) -> Float[AnyArray, "*batch rows n"]:
    """x @ Q for the block-diagonal Q of ``theta``, in O(rows n block), without the dense Q."""
    n = x.shape[-1]
    xp = namespace(theta)
    body, tail = block_cayley_blocks(theta, n, block)
    cut = body.shape[-3] * block
    split = x[..., :cut].reshape(*x.shape[:-1], cut // block, block)
    turned = matmul(split.swapaxes(-2, -3), body).swapaxes(-2, -3)
    parts = [turned.reshape(*x.shape[:-1], cut), matmul(x[..., cut:], tail)]
    return xp.concatenate(parts, axis=-1)


def block_cayley(theta: Float[AnyArray, "*batch p"], n: int, block: int) -> Float[AnyArray, "*batch n n"]:
    """The dense block-diagonal Q of ``theta`` (flat: full blocks in order, then the smaller last one)."""
    return apply_block_cayley(eye_like(theta, theta.shape[:-1], n), theta, block)
