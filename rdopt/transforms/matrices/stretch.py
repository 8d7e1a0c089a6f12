"""Stretches: symmetric positive definite matrices of bounded condition, the other half of a polar decomposition.

exp(K) with K symmetric and |K|_F below BOUND, so that no parameters make a matrix with a condition above
exp(2 BOUND): every invertible A = exp(K) Q of a smaller condition is one stretch of one rotation.
"""

import numpy as np
from jaxtyping import Float
from scipy.linalg import expm

from rdopt.transforms.arrays import AnyArray, eye_like, matmul, namespace

BOUND = float(np.log(4.0))


def stretch_size(n: int) -> int:
    """Entries of a symmetric matrix of width n."""
    return n * (n + 1) // 2


def stretch(theta: Float[AnyArray, "*batch size"], n: int) -> Float[AnyArray, "*batch n n"]:
    """exp(K), K the symmetric matrix of theta shrunk to a norm below BOUND; the identity at theta = 0."""
    xp = namespace(theta)
    rows, cols = np.triu_indices(n)
    place = np.zeros((n, n), np.int64)
    place[rows, cols] = place[cols, rows] = np.arange(len(rows))
    K = theta[..., place]
    K = K / xp.sqrt(1 + xp.sum(K * K, axis=(-2, -1), keepdims=True) / BOUND**2)
    return expm(K) if xp is np else _exponential(K)


def _exponential(K: Float[AnyArray, "*batch n n"]) -> Float[AnyArray, "*batch n n"]:
    """exp(K) = exp(K / 8)^8 by products alone; of a norm below BOUND, the seventh power left out is below 1e-9."""
    X, eye = K / 8, eye_like(K, (), K.shape[-1])
    total = eye
    for k in (6, 5, 4, 3, 2, 1):
        total = eye + matmul(X, total) / k
    for _ in range(3):
        total = matmul(total, total)
    return total
