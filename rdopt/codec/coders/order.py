"""The order in which a matrix is coded: lanes of entries whose trellis hangs together.

Columns: lane j is column j from the top. Diagonals: lane w holds the entries with i + j = w (mod n) from the bottom
row up, the order in which two-sided feedback takes them.
"""

from typing import Literal

import numpy as np
from jaxtyping import Int, Integer, Shaped

from rdopt.codec.grids.trellis import SEGMENT, walk_lanes

Order = Literal["columns", "diagonals"]
ALL = slice(None)
_ENDLESS = 1 << 30


def restart(order: Order) -> int:
    """Entries after which a lane's trellis starts anew."""
    return SEGMENT if order == "columns" else _ENDLESS


def to_lanes(x: Shaped[np.ndarray, "m n"], order: Order, some: slice = ALL) -> Shaped[np.ndarray, "lanes m"]:
    """Entries of a matrix lane by lane, of all lanes or of some."""
    if order == "columns":
        return np.ascontiguousarray(x[:, some].T)
    return np.ascontiguousarray(np.take_along_axis(x, _column_of(x.shape, some), axis=1)[::-1].T)


def sums_in_lanes(
    row: Int[np.ndarray, " m"], col: Int[np.ndarray, " n"], order: Order, some: slice = ALL
) -> Int[np.ndarray, "lanes m"]:
    """row_i + col_j of the entries, lane by lane."""
    if order == "columns":
        return col[some, None] + row
    return np.ascontiguousarray((row[:, None] + col[_column_of((len(row), len(col)), some)])[::-1].T)


def walked_lanes(
    k: Int[np.ndarray, "m n"], order: Order, states: int, some: slice = ALL
) -> tuple[Int[np.ndarray, "lanes m"], Integer[np.ndarray, "lanes m"]]:
    """Indices (int32) and grids (uint8) of a matrix lane by lane, the grids by the trellis."""
    lanes = to_lanes(k, order, some).astype(np.int32)
    return lanes, walk_lanes(lanes, states, restart(order))[1]


def from_lanes(lanes: Shaped[np.ndarray, "n m"], order: Order) -> Shaped[np.ndarray, "m n"]:
    """Inverse of `to_lanes`."""
    if order == "columns":
        return np.ascontiguousarray(lanes.T)
    rows = lanes.T[::-1]
    out = np.empty_like(rows)
    np.put_along_axis(out, _column_of(rows.shape), rows, axis=1)
    return out


def _column_of(shape: tuple[int, ...], some: slice = ALL) -> Shaped[np.ndarray, "m lanes"]:
    """The column of the entry of row i in lane w."""
    m, n = shape
    return (np.arange(n)[None, some] - np.arange(m)[:, None]) % n
