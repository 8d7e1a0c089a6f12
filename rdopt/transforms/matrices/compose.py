"""Products of orthogonal matrices and the measure of how orthogonal a matrix is."""

from collections.abc import Sequence
from functools import reduce

import numpy as np
from jaxtyping import Float

from rdopt.transforms.arrays import AnyArray, eye_like, matmul


def identity(n: int, batch: tuple[int, ...] = ()) -> Float[np.ndarray, "*batch n n"]:
    """The float64 identity, once a batch entry."""
    return np.array(eye_like(np.zeros(()), batch, n))


def compose(parts: Sequence[Float[AnyArray, "... n n"]]) -> Float[AnyArray, "... n n"]:
    """Q = Q_1 Q_2 ... Q_k, the basis of rows x -> x Q_1, then Q_2, and so on.

    Raises:
        ValueError: when there is nothing to compose.
    """
    if not parts:
        raise ValueError("compose needs at least one matrix")
    return reduce(matmul, parts)


def orthogonality_error(Q: Float[AnyArray, "... n n"]) -> float:
    """max |Q^T Q - I|, formed in float64 whatever the precision of Q."""
    exact = np.asarray(Q, dtype=np.float64)
    gram = exact.swapaxes(-1, -2) @ exact
    return float(np.max(np.abs(gram - np.eye(exact.shape[-1])), initial=0.0))
