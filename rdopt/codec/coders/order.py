"""The order in which a matrix is coded: lanes of entries whose trellis hangs together.

Columns: lane j is column j from the top. Diagonals: lane w holds the entries with i + j = w (mod n) from the bottom
row up, the order in which two-sided feedback takes them.
"""

from typing import Literal

import numpy as np
from jaxtyping import Shaped

Order = Literal["columns", "diagonals"]


def to_lanes(x: Shaped[np.ndarray, "m n"], order: Order) -> Shaped[np.ndarray, "n m"]:
    """Entries of a matrix lane by lane."""
    if order == "columns":
        return np.ascontiguousarray(x.T)
    return np.ascontiguousarray(np.take_along_axis(x, _column_of(x.shape), axis=1)[::-1].T)


def from_lanes(lanes: Shaped[np.ndarray, "n m"], order: Order) -> Shaped[np.ndarray, "m n"]:
    """Inverse of `to_lanes`."""
    if order == "columns":
        return np.ascontiguousarray(lanes.T)
    rows = lanes.T[::-1]
    out = np.empty_like(rows)
    np.put_along_axis(out, _column_of(rows.shape), rows, axis=1)
    return out


def _column_of(shape: tuple[int, ...]) -> Shaped[np.ndarray, "m n"]:
    """The column of the entry of row i in lane w."""
    m, n = shape
    return (np.arange(n)[None, :] - np.arange(m)[:, None]) % n
