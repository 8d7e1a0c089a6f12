"""RTN: every entry rounded alone to a uniform grid with one step a row.

With fixed-length codes the step is the row's largest magnitude over 2^(b-1) - 1. With entropy coding the length of a
code no longer bounds the grid, so the step sets the rate: here a multiple of the row's rms (every row gets the same
rate) or of the matrix's rms (every row the same error), infinite support, no clipping, as in Huffman-RTN of
2603.04956, figure 2.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float, Int

Rows = Literal["row", "tensor"]


def row_rms(W: Float[np.ndarray, "out in"], rows: Rows) -> Float[np.ndarray, " out"]:
    """What the step of a row is proportional to: its own rms, or that of the matrix; 0 for zero rows."""
    power = np.mean(np.square(W, dtype=np.float64), axis=1)
    return np.sqrt(power if rows == "row" else np.full(len(power), power.mean()))


def rtn(W: Float[np.ndarray, "out in"], step: Float[np.ndarray, " out"]) -> Int[np.ndarray, "out in"]:
    """Nearest indices z with W ~ step_i z_ij, ties to even.

    Args:
        W: weights.
        step: positive step of each row.
    """
    return np.rint(np.asarray(W, np.float64) / step[:, None]).astype(np.int32)
