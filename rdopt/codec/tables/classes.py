"""Classes of entries that share a table: a rank-1 fit of the spread of the indices.

The spread of z_ij is modelled as rho_i kappa_j, a row scale times a column scale. Both are stored as integer
logarithms, and their sum is the class of the entry, so that one matrix needs rows + columns small integers
instead of a class per entry.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num

from rdopt.codec.coders.constriction import pack_lists

MAX_CLASS = 1 << 10  # more octaves than float32 has
_AT_ONCE = 1 << 22  # entries whose squares are in memory at once
RowsCols = tuple[Float[np.ndarray, " _"], Float[np.ndarray, " _"]]  # a positive number of every row and column


class Spreads(NamedTuple):
    """Integer logarithms of the row and column spreads of one matrix, in units of 1/precision octave."""

    row: Int[np.ndarray, " out"]
    col: Int[np.ndarray, " in"]


def rank1_spreads(
    z: Num[np.ndarray, "out in"], iterations: int = 3
) -> tuple[Float[np.ndarray, " out"], Float[np.ndarray, " in"]]:
    """Row and column scales (rho, kappa) with rho_i^2 kappa_j^2 ~ z_ij^2, float64, floored away from zero.

    Alternating maximum likelihood of a Gaussian with variance rho_i^2 kappa_j^2: each scale squared is the mean
    of z^2 over the other one squared. Floors are those of counts, since z are indices or coordinates that become some;
    `encode.structured` prices real residuals, without that floor, `rate.spreads` is for gradients in float32.
    """
    height = max(1, _AT_ONCE // z.shape[1])
    some = [slice(i, i + height) for i in range(0, len(z), height)]

    def power(rows: slice) -> Float[np.ndarray, "_ in"]:
        return np.square(z[rows], dtype=np.float64)

    def over_rows(weights: Float[np.ndarray, " out"]) -> Float[np.ndarray, " in"]:
        return np.sum([weights[rows] @ power(rows) for rows in some], axis=0) / len(z)

    # An all-zero row or column would get scale zero; half a count keeps its logarithm finite.
    floor_row, floor_col = 0.5 / z.shape[1], 0.5 / z.shape[0]
    rho2, kappa2 = np.ones(len(z)), np.maximum(over_rows(np.ones(len(z))), floor_col)
    for _ in range(iterations):
        rho2 = np.concatenate([power(rows) @ (1.0 / kappa2) for rows in some]) / z.shape[1]
        rho2 = np.maximum(rho2, floor_row)
        rho2 /= np.exp(np.mean(np.log(rho2)))
        kappa2 = np.maximum(over_rows(1.0 / rho2), floor_col)
    return np.sqrt(rho2), np.sqrt(kappa2)


def quantize_spreads(
    rho: Float[np.ndarray, " out"], kappa: Float[np.ndarray, " in"], precision: int
) -> Spreads:
    """Rounds log2 of the scales to multiples of 1/precision octave; precision 0 makes one class of the matrix."""
    if precision == 0:
        overall = np.rint(np.log2(np.mean(rho) * np.sqrt(np.mean(kappa**2)))).astype(np.int32)
        return Spreads(np.zeros(rho.size, np.int32), np.full(kappa.size, overall, np.int32))
    row = np.rint(precision * np.log2(rho)).astype(np.int32)
    return Spreads(row, np.rint(precision * np.log2(kappa)).astype(np.int32))


def log2_spread(key: int, precision: int, width: int = 1) -> tuple[int, int]:
    """log2 of the spread in the middle of `width` neighbouring classes, an exact fraction (numerator, denominator)."""
    return 2 * key * width + width - 1, 2 * max(precision, 1)


def classes_of(spreads: Spreads) -> Int[np.ndarray, "out in"]:
    """The class of every entry: the sum of its row's and its column's integer spread."""
    return spreads.row[:, None] + spreads.col[None, :]


def pack_spreads(spreads: Sequence[Spreads]) -> bytes:
    """Row spreads, then column spreads, of all matrices as one entropy-coded string."""
    return pack_lists([s.row for s in spreads]) + pack_lists([s.col for s in spreads])
