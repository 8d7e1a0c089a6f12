"""Classes and tables of trellis indices: the precision of the spreads and the shapes, by total bits.

An entry's class is the sum of its row's and its column's integer spread, an entry's table that of its class and
grid. The tables of an octave of classes follow from one shape (see `shapes`), so a file describes three small
numbers an octave and grid instead of frequencies.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rdopt.codec.coders.bits import BitReader, BitWriter, unzigzag, zigzag
from rdopt.codec.coders.rans import Coder, make_coder
from rdopt.codec.grids.trellis import RateTerm, TrellisPath
from rdopt.codec.tables.allocation import pack_spreads
from rdopt.codec.tables.classes import Spreads, classes_of, quantize_spreads, rank1_spreads
from rdopt.codec.tables.frequencies import PRECISION
from rdopt.codec.tables.shapes import (
    TrellisShape,
    fit_shape,
    is_shape,
    masses,
    octave_of,
    raw_bits,
    table,
)

SPREAD_PRECISIONS = (4, 8, 2, 1, 0)
MAX_CLASSES = 1 << 12
BITS_SIZE = 192  # magnitudes whose code length the trellis looks up
_FINEST_RATED = 5  # octave of spread from which the rate term has nothing to choose between
_COUNTED = 512
_DEFAULT = (TrellisShape(), TrellisShape(15, 6, 1))
OctaveShapes = dict[tuple[int, int], TrellisShape]  # (octave, grid) -> shape
Spread = tuple[Float[np.ndarray, " _"], Float[np.ndarray, " _"]]  # of rows and columns


class TrellisPlan(NamedTuple):
    """Everything the entropy coder needs beside the indices.

    Attributes:
        precision: spreads are multiples of 1/precision octave (0: one class per matrix).
        spreads: per matrix.
        shapes: of the tables.
    """

    precision: int
    spreads: list[Spreads]
    shapes: OctaveShapes

    def keys(self) -> list[int]:
        """All classes that occur, ascending."""
        sums = (np.add.outer(np.unique(s.row), np.unique(s.col)) for s in self.spreads)
        return sorted(set().union(*(x.ravel().tolist() for x in sums)))

    def coder(self) -> Coder:
        """The integer tables, in the order of `keys`, grid 0 before grid 1."""
        tables, shifts = [], []
        for key in self.keys():
            middle = log2_spread(key, self.precision)
            for grid in range(2):
                tables.append(table(self.shapes[octave_of(middle), grid], grid, middle))
                shifts.append(raw_bits(middle))
        return make_coder(tables, shifts)

    def tables_of(self, matrix: int, keys: list[int]) -> Int[np.ndarray, "out in"]:
        """The position in `keys` of the class of every entry of a matrix."""
        place = np.zeros(keys[-1] - keys[0] + 1, np.int16)
        place[np.array(keys) - keys[0]] = np.arange(len(keys))
        return place[classes_of(self.spreads[matrix]) - keys[0]]


def log2_spread(key: int, precision: int) -> tuple[int, int]:
    """log2 of the spread of a class as an exact fraction."""
    return key, max(precision, 1)


def starting_plan(spreads: Sequence[Spread]) -> TrellisPlan:
    """Classes from expected spreads (rows, columns), with shapes not yet fitted."""
    rounded = [quantize_spreads(rho, kappa, SPREAD_PRECISIONS[0]) for rho, kappa in spreads]
    return _with_default_shapes(TrellisPlan(SPREAD_PRECISIONS[0], rounded, {}))


def fit_plan(
    paths: Sequence[TrellisPath], fits: Sequence[Spread] | None = None, precisions: Sequence[int] = SPREAD_PRECISIONS
) -> TrellisPlan:
    """The cheapest precision with its shapes: code length (of real-valued tables) + bytes of spreads and shapes.

    Args:
        paths: of all matrices.
        fits: row and column spreads; of the coordinates before rounding they are closer than those of the values,
            which are what is fitted without them.
        precisions: to choose from; 0, one class per matrix, always fits.
    """
    fits = [rank1_spreads(path.values) for path in paths] if fits is None else fits
    best, least = None, np.inf
    shapes: OctaveShapes = {}
    for precision in precisions:
        plan = TrellisPlan(precision, [quantize_spreads(*fit, precision) for fit in fits], {})
        if plan.keys()[-1] - plan.keys()[0] >= MAX_CLASSES:
            continue
        plan, bits = _fit_shapes(_with_default_shapes(plan), paths, shapes)
        shapes = shapes | plan.shapes
        bits += 8 * (len(write_shapes(plan)) + len(pack_spreads(plan.spreads)))
        if bits < least:
            best, least = plan, bits
    return fit_plan(paths, fits, (0,)) if best is None else best


def _with_default_shapes(plan: TrellisPlan) -> TrellisPlan:
    octaves = {octave_of(log2_spread(key, plan.precision)) for key in plan.keys()}  # noqa: SIM118 - a tuple
    return plan._replace(shapes={(octave, grid): _DEFAULT[grid] for octave in octaves for grid in range(2)})


def _fit_shapes(plan: TrellisPlan, paths: Sequence[TrellisPath], known: OctaveShapes) -> tuple[TrellisPlan, float]:
    """The plan with fitted shapes, and its bits; shapes of another precision are near and start the search."""
    keys = plan.keys()
    middles = [log2_spread(key, plan.precision) for key in keys]
    spread = np.array([2.0 ** (a / b) for a, b in middles])
    raw = np.array([raw_bits(m) for m in middles])
    octave = np.array([octave_of(m) for m in middles])
    counts, bits = _counts(plan, paths, keys, raw)
    shapes = {}
    for o, grid in plan.shapes:
        some = octave == o
        used = int(np.flatnonzero(counts[some, grid].any(axis=0)).max(initial=0)) + 2
        part = np.ascontiguousarray(counts[some, grid, :used])
        start, stride = (known[o, grid], 1) if (o, grid) in known else (_DEFAULT[grid], 4)
        shapes[o, grid], found = fit_shape(start, grid, spread[some], raw[some], part, stride)
        bits += found
    return plan._replace(shapes=shapes), bits


def _counts(
    plan: TrellisPlan, paths: Sequence[TrellisPath], keys: list[int], raw: Int[np.ndarray, " classes"]
) -> tuple[Float[np.ndarray, "classes 2 counted"], float]:
    """How often each |k| >> raw occurs by class and grid, and the bits of signs and raw low bits."""
    total = np.zeros(len(keys) * 2 * _COUNTED)
    bits = 0.0
    for matrix, path in enumerate(paths):
        tables = plan.tables_of(matrix, keys).astype(np.int64)
        shift = raw[tables]
        high = np.minimum(np.abs(path.k).astype(np.int64) >> shift, _COUNTED - 1)
        total += np.bincount(((2 * tables + path.grids) * _COUNTED + high).ravel(), minlength=total.size)
        bits += float(np.count_nonzero(path.k) + shift.sum())
    return total.reshape(len(keys), 2, _COUNTED), bits


def rate_table(plan: TrellisPlan) -> tuple[Float[np.ndarray, "classes 2 K"], int]:
    """(code length of |k| by class and grid, sign included; the class of its first row).

    Zero for spreads so wide that neighbouring indices cost the same.
    """
    low, high = plan.keys()[0], plan.keys()[-1]
    middles = [log2_spread(key, plan.precision) for key in range(low, high + 1)]
    bits = np.zeros((len(middles), 2, BITS_SIZE), np.float32)
    for row, middle in enumerate(middles):
        octave = octave_of(middle)
        if octave >= _FINEST_RATED:
            continue
        for grid in range(2):
            shape = plan.shapes.get((octave, grid), _DEFAULT[grid])
            spread = np.array([2.0 ** (middle[0] / middle[1])])
            p = masses(shape, grid, spread, np.zeros(1, np.int64), BITS_SIZE)[0] + 2.0**-PRECISION
            bits[row, grid] = -np.log2(p) + (np.arange(BITS_SIZE) > 0)
    return bits, low


def rates_of(plan: TrellisPlan, mu: float) -> list[RateTerm]:
    """What every matrix of a plan is quantized with, mu squared steps a bit."""
    bits, low = rate_table(plan)
    return [RateTerm(s.row.astype(np.int64), (s.col - low).astype(np.int64), bits, mu) for s in plan.spreads]


def write_shapes(plan: TrellisPlan) -> bytes:
    """All shapes as Elias gamma codes of their differences to the shape of the octave before."""
    out = BitWriter()
    for grid in range(2):
        last = _DEFAULT[grid]
        for octave in sorted({o for o, _ in plan.shapes}):
            shape = plan.shapes[octave, grid]
            out.gammas(zigzag(a - b) for a, b in zip(shape, last, strict=True))
            last = shape
    return out.bytes()


def read_shapes(data: bytes, plan: TrellisPlan) -> TrellisPlan:
    """Inverse of `write_shapes` for a plan whose spreads are known.

    Raises:
        ValueError: damaged bytes.
    """
    keys = plan.keys()
    if keys[-1] - keys[0] >= MAX_CLASSES:
        raise ValueError(f"{keys[-1] - keys[0]} classes")
    source, shapes = BitReader(data), {}
    for grid in range(2):
        last = _DEFAULT[grid]
        for octave in sorted({o for o, _ in _with_default_shapes(plan).shapes}):
            last = TrellisShape(*(a + unzigzag(b) for a, b in zip(last, source.gammas(3), strict=True)))
            if not is_shape(*last):
                raise ValueError(f"a table's shape is {tuple(last)}")
            shapes[octave, grid] = last
    return plan._replace(shapes=shapes)
