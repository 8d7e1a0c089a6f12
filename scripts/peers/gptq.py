"""Rounding alone (RTN), and GPTQ (Frantar et al. 2210.17323, algorithm 1): each error spread over the columns left.

RTN with fixed-length codes has the row's largest magnitude over 2^(b-1) - 1 for a step. With entropy coding the length
of a code no longer bounds the grid, so the step sets the rate: here a multiple of the row's rms (every row gets the
same rate) or of the matrix's rms (every row the same error), infinite support, no clipping, as in Huffman-RTN of
2603.04956, figure 2.

GPTQ at its published settings: H = 2 X X^T damped by 1 % of its mean diagonal (section 3.3, step 3), columns in their
own order (step 1) or, in the authors' later code, by falling diag H ("act-order"). Grouping and clipping belong to
fixed-length grids and are left out: entropy coding makes the support infinite (Huffman-GPTQ of 2603.04956).
"""

from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from rdopt.config.errors import UserError

ColumnOrder = Literal["given", "activation"]
StepScope = Literal["row", "tensor"]
GPTQ_DAMPING = 0.01  # published
_BLOCK = 32  # lazy batch updates (section 3.3, step 2): the result does not depend on it


def row_rms(W: Float[np.ndarray, "out in"], scope: StepScope) -> Float[np.ndarray, " out"]:
    """What the step of a row is proportional to: its own rms, or that of the matrix; 0 for zero rows."""
    power = np.mean(np.square(W, dtype=np.float64), axis=1)
    return np.sqrt(power if scope == "row" else np.full(len(power), power.mean()))


def rtn(W: Float[np.ndarray, "out in"], step: Float[np.ndarray, " out"]) -> Int[np.ndarray, "out in"]:
    """Nearest indices z with W ~ step_i z_ij, ties to even.

    Args:
        W: weights.
        step: positive step of each row.
    """
    return np.rint(np.asarray(W, np.float64) / step[:, None]).astype(np.int32)


def inverse_factor(H: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """Upper U with U^T U = H^-1, float64, from the factor of the reversed H, so that H^-1 is never formed.

    Raises:
        UserError: H is singular.
    """
    try:
        L = np.linalg.cholesky(H[::-1, ::-1])
    except np.linalg.LinAlgError as error:
        raise UserError("GPTQ needs invertible second moments; raise its damping (0.01 is usual).") from error
    # With J the reversal, J H J = L L^T gives H^-1 = (J L^-T J) (J L^-1 J), and J L^-1 J is upper triangular.
    return np.linalg.inv(L)[::-1, ::-1]


def gptq(
    W: Float[np.ndarray, "out in"],
    sigma: Float[np.ndarray, "in in"],
    step: Float[np.ndarray, " out"],
    *,
    damping: float = GPTQ_DAMPING,
    order: ColumnOrder = "given",
) -> Int[np.ndarray, "out in"]:
    """Indices z with W ~ step_i z_ij that keep W x rather than W.

    For each column j in order: z_j = round(w_j / step), then w_l <- w_l - (w_j - step z_j) U_jl / U_jj for all
    l > j, U^T U = (sigma + damping mean(diag sigma) I)^-1.

    Args:
        W: weights.
        sigma: second moment of the input.
        step: positive step of each row.
        damping: share of the mean diagonal added to the diagonal.
        order: of the columns; it costs no bits, for the steps do not depend on it.

    Returns:
        int32 indices. Columns that no input ever reaches become zero. Computed in float64.
    """
    H = np.array(sigma, np.float64)
    dead = np.diagonal(H) <= 0
    H[dead, dead] = 1.0
    H[np.diag_indices_from(H)] += damping * np.mean(np.diagonal(H))
    work = np.where(dead, 0.0, np.asarray(W, np.float64)) / step[:, None]
    way = np.argsort(-np.diagonal(H), kind="stable") if order == "activation" else np.arange(len(H))
    work, U = work[:, way], inverse_factor(H[np.ix_(way, way)])
    z = np.zeros(W.shape, np.int32)
    for low in range(0, len(way), _BLOCK):
        high = min(low + _BLOCK, len(way))
        errors = np.empty((len(work), high - low))
        for j in range(low, high):
            rounded = np.rint(work[:, j])
            z[:, way[j]] = rounded
            errors[:, j - low] = (work[:, j] - rounded) / U[j, j]
            work[:, j + 1 : high] -= np.outer(errors[:, j - low], U[j, j + 1 : high])
        work[:, high:] -= errors @ U[low:high, high:]
    return z
