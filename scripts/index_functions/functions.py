"""Structure along the index, W = f + r: three families of f, of the layer index, the channel index and low rank.

Every family projects a unit, (layers, out, in), orthogonally onto nested spaces, so that what f explains grows with
its numbers. Coded, these are rounded to a grid and what the rounding leaves stays in r: it costs bits, not error.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import scipy.fft
from jaxtyping import Float, Int

from index_functions.bits import gaussian_bits, rate_at, spread_histogram
from rdopt.codec.streams.structured import SHIFTS, product
from rdopt.encode.structured import factor_bits, rounded_factors

_Unit = Float[np.ndarray, "layers out in"]
_SCALE_BITS = 4.0  # of a row's or a column's spread in a mode of the layer index, about
_LAW_BITS = 20.0  # of the spread of a group of coefficients, about


class StructuredPart(NamedTuple):
    """A structured part as a decoder has it.

    Attributes:
        f: the unit's structured part.
        bits: of its numbers and of their laws.
    """

    f: _Unit
    bits: float


class IndexFamily(Protocol):
    """One family fitted to a unit."""

    @property
    def sizes(self) -> Sequence[int]:
        """Numbers of modes, coefficients or ranks, a ladder."""
        ...

    @property
    def precisions(self) -> Sequence[int]:
        """Grids that the numbers of f can be rounded to, an octave apart, the usual one first."""
        ...

    def numbers(self, size: int) -> int:
        """How many numbers f has."""
        ...

    def explained(self, size: int) -> float:
        """Share of the unit's energy that f has."""
        ...

    def part(self, size: int, precision: int) -> StructuredPart:
        """f from rounded numbers; the unit is in steps of its own grid."""
        ...


class LayerModes:
    """The stack over layers in the first cosine modes of the layer index; one mode is the mean over layers.

    Args:
        X: a stack of one kind of matrix.
        budgets: unread; a mode has the numbers of a matrix, so that the ladder runs to half of the layers.
    """

    precisions = (1, 0, 2, 3)

    def __init__(self, X: _Unit, budgets: Sequence[float]) -> None:
        self.sizes = range(1, len(X) // 2 + 1)
        self._modes = np.asarray(scipy.fft.dct(X, axis=0, norm="ortho"))

    def numbers(self, size: int) -> int:
        """Of so many modes."""
        return size * self._modes[0].size

    def explained(self, size: int) -> float:
        """Share of energy of the first modes."""
        energy = np.sum(np.square(self._modes), axis=(1, 2))
        return _share(energy[:size].sum(), energy.sum())

    def part(self, size: int, precision: int) -> StructuredPart:
        """Modes rounded to a grid, priced with rank-1 spreads each."""
        step = 2.0**precision
        z = np.zeros_like(self._modes)
        z[:size] = np.rint(self._modes[:size] / step)
        spreads = [spread_histogram(mode / step) for mode in self._modes[:size]]
        bits = sum(rate_at(counts, 0.0) + _SCALE_BITS * sum(z[0].shape) for counts in spreads)
        return StructuredPart(np.asarray(scipy.fft.idct(z * step, axis=0, norm="ortho")), bits)


@lru_cache(maxsize=64)
def corner_orders(rows: int, columns: int) -> tuple[Int[np.ndarray, " n"], ...]:
    """Places of 2-D cosine coefficients from slow to fast: in both indices alike, in the row's, in the column's."""
    i, j = (np.arange(n)[:, None] / n for n in (rows, columns))
    both = np.maximum(i + 1 / rows, (j + 1 / columns).T)
    keys = (both + 1e-9 * (i + j.T), i + 0 * j.T, 0 * i + j.T)
    return tuple(np.argsort(key, axis=None, kind="stable") for key in keys)


class Corner:
    """Slow 2-D cosine coefficients of one matrix: smooth in both channel indices, or in the better one.

    Args:
        X: one matrix, (1, out, in).
        budgets: shares of the matrix's numbers.
    """

    precisions = (1, 0, 2, 3)

    def __init__(self, X: _Unit, budgets: Sequence[float]) -> None:
        self._shape = X.shape[1:]
        self._coefficients = np.asarray(scipy.fft.dctn(X[0], norm="ortho")).ravel()
        self.sizes = [round(share * X.size) for share in budgets]
        self._orders = corner_orders(*self._shape)
        self._energies = [np.cumsum(np.square(self._coefficients[order])) for order in self._orders]

    def numbers(self, size: int) -> int:
        """One a coefficient."""
        return size

    def explained(self, size: int) -> float:
        """Share of energy of the best corner of so many coefficients."""
        return max(_share(e[size - 1], e[-1]) for e in self._energies) if size else 0.0

    def part(self, size: int, precision: int) -> StructuredPart:
        """Coefficients rounded to a grid; those of an octave of places share a Gaussian."""
        order = max(zip(self._orders, self._energies, strict=True), key=lambda pair: pair[1][size - 1])[0][:size]
        step = 2.0**precision
        groups = np.split(self._coefficients[order] / step, 2 ** np.arange(size.bit_length()))
        bits = sum(gaussian_bits(group) + _LAW_BITS for group in groups if group.size)
        z = np.zeros_like(self._coefficients)
        z[order] = np.rint(self._coefficients[order] / step) * step
        return StructuredPart(np.asarray(scipy.fft.idctn(z.reshape(self._shape), norm="ortho"))[None], bits)


class LowRank:
    """The truncated singular value decomposition of one matrix.

    Args:
        X: one matrix, (1, out, in).
        budgets: shares of the matrix's numbers; a rank takes out + in of them.
    """

    # Of the encoder's factors: log2 of the product of both factors' steps, taken negative.
    precisions = (1, *(s for s in SHIFTS if s != 1))

    def __init__(self, X: _Unit, budgets: Sequence[float]) -> None:
        self._per_rank = sum(X.shape[1:])
        self.sizes = [int(share * X.size / self._per_rank) for share in budgets]
        self._U, self._s, self._V = np.linalg.svd(X[0], full_matrices=False)

    def numbers(self, size: int) -> int:
        """Of both factors."""
        return size * self._per_rank

    def explained(self, size: int) -> float:
        """Share of energy of the largest singular values."""
        energy = np.square(self._s)
        return _share(energy[:size].sum(), energy.sum())

    def part(self, size: int, precision: int) -> StructuredPart:
        """The encoder's rounded factors and its estimate of their bits."""
        f = rounded_factors(self._U[:, :size] * self._s[:size], self._V[:size].T, precision)
        return StructuredPart(product(f)[None] / 2.0**precision, factor_bits(f))


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else 0.0
