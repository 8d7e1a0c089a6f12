"""Tables of trellis indices from a few numbers: a class names the spread, an octave of spreads the shape.

An entry's class is the sum of its row's and its column's integer spread, its table that of its class and grid. On
grid 0 index k takes the bin (2k - 1, 2k + 1) steps, on grid 1 (2k - 2, 2k), except that the zero bin ends at `zero`,
which the trellis and a rate term move. So a file describes three small numbers an octave and grid instead of
frequencies; they and the precision of the spreads are chosen by total bits.
"""

from collections.abc import Sequence
from decimal import Decimal
from functools import cache
from itertools import product
from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float, Int

from rdopt.codec.coders.bits import BitReader, BitWriter, unzigzag, zigzag
from rdopt.codec.coders.order import ALL, Order, sums_in_lanes, walked_lanes
from rdopt.codec.coders.rans import Coder, make_coder
from rdopt.codec.grids.trellis import RateTerm
from rdopt.codec.tables.classes import RowsCols, Spreads, log2_spread, pack_spreads, quantize_spreads
from rdopt.codec.tables.derived import BLEND_UNIT, SCALE_UNIT, approximate_tails, derived_frequencies
from rdopt.codec.tables.frequencies import PRECISION
from rdopt.transforms.kernels import kernel

TRELLIS_SCALES, TRELLIS_ZEROS, TRELLIS_BLENDS = 24, 16, 9
_PLAIN = 15  # the scale that leaves spreads as they are
OCTAVES = (-4, 6)  # spreads outside share the shapes of the first and last octave
_FINE = 5  # octaves of spread from which the low bits of an index are coded raw
_REACH = 7  # spreads covered by a table before its escape
SPREAD_PRECISIONS = (4, 8, 2, 1, 0)
MAX_CLASSES = 1 << 12
BITS_SIZE = 192  # magnitudes whose code length the trellis looks up
_FINEST_RATED = 5  # octave of spread from which the rate term has nothing to choose between
_COUNTED = 512
_AT_ONCE = 1 << 20  # entries that are walked and counted at once
_MOVES = [(a, b, c) for a, b, c in product((-1, 0, 1), repeat=3) if (a, b, c) != (0, 0, 0)]
_AXES = [move for move in _MOVES if sum(map(abs, move)) == 1]


class TrellisShape(NamedTuple):
    """The shape of the tables of one octave of spreads on one grid.

    Attributes:
        scale: the spread is multiplied by 2^((scale - _PLAIN) / SCALE_UNIT).
        zero: the zero bin ends at (zero + 1) / 8 of a step on grid 0, / 16 on grid 1.
        blend: the Laplace density has weight blend / BLEND_UNIT.
    """

    scale: int = _PLAIN
    zero: int = 6
    blend: int = 1


OctaveShapes = dict[tuple[int, int], TrellisShape]  # (octave, grid) -> shape


def octave_of(spread: tuple[int, int]) -> int:
    """Which shapes a class uses: floor(log2 spread), clipped to OCTAVES."""
    return max(OCTAVES[0], min(OCTAVES[1], spread[0] // spread[1]))


def raw_bits(spread: tuple[int, int]) -> int:
    """Low bits of an index that are coded raw: at spreads of many steps they are as good as uniform."""
    return max(0, spread[0] // spread[1] - _FINE)


def table_size(spread: tuple[int, int]) -> int:
    """Symbols of a table before its escape."""
    octave = spread[0] // spread[1] + 1 - raw_bits(spread)
    return max(2, (_REACH << max(octave, 0)) >> (1 + max(-octave, 0)))


@cache
def table(shape: TrellisShape, grid: int, spread: tuple[int, int]) -> Int[np.ndarray, " symbols"]:
    """Frequencies of |k| >> raw_bits and of the escape, summing to 2^PRECISION, each at least 1.

    Args:
        shape: of the class's octave.
        grid: 0 or 1.
        spread: log2 of that of the class, as `log2_spread` gives it.
    """
    size, raw = table_size(spread), raw_bits(spread)
    zero = Decimal(shape.zero + 1) / (8 if grid == 0 else 16)
    bounds = [zero if k == 1 else Decimal(2 * k - 1 - grid) for k in range(1 << raw, (size + 1) << raw, 1 << raw)]
    return derived_frequencies(bounds, spread, shape.scale - _PLAIN, shape.blend, escape=True)


def masses(
    shapes: Sequence[tuple[int, int, int]],
    grid: int,
    spread: Float[np.ndarray, " classes"],
    raw: Int[np.ndarray, " classes"],
    size: int,
) -> Float[np.ndarray, "shapes classes size"]:
    """Probabilities of |k| >> raw = 0..size-1 (the last one of all above), float64: to choose, never to code."""
    scale, zero, blend = (x[:, None, None] for x in np.array(shapes).T)
    bounds = np.repeat(2.0 * (np.arange(1, size) << raw[:, None])[None] - 1 - grid, len(shapes), axis=0)
    bounds[:, raw == 0, 0] = (zero[:, 0] + 1) / (8 if grid == 0 else 16)
    t, w = bounds / (spread[:, None] * 2.0 ** ((scale - _PLAIN) / SCALE_UNIT)), blend / BLEND_UNIT
    laplace, gaussian = approximate_tails(t)
    tail = w * laplace + (1 - w) * gaussian
    mass = np.empty((*tail.shape[:2], size))
    mass[..., 0], mass[..., 1:] = 1, tail
    mass[..., :-1] -= tail
    return np.maximum(mass, 0, out=mass)


def fit_shape(
    start: TrellisShape,
    grid: int,
    spread: Float[np.ndarray, " classes"],
    raw: Int[np.ndarray, " classes"],
    counts: Float[np.ndarray, "classes size"],
    stride: int = 4,
) -> tuple[TrellisShape, float]:
    """The shape that codes these counts in the fewest bits, and the bits; pattern search from `start`.

    Strides from `stride` down to 2 along single fields, then 1 along the diagonals too, as the fields trade against
    one another. The lengths of all moves still to be tried from a shape are computed at once, since most tables
    are so small that the calls take the time.
    """
    known: dict[tuple[int, int, int], float] = {}

    def measure(shapes: Sequence[tuple[int, int, int]]) -> None:
        new = [x for x in shapes if x not in known]
        p = masses(new, grid, spread, raw, counts.shape[1]) + 2.0**-PRECISION
        bits = -np.sum(counts * np.log2(p, out=p), axis=(1, 2))
        known.update(zip(new, bits.tolist(), strict=True))

    best = (start.scale, start.zero, start.blend)
    measure([best])
    while stride:
        moved, moves = False, _MOVES if stride == 1 else _AXES
        for number, move in enumerate(moves):
            trial = _moved(best, move, stride)
            if trial not in known:
                if not is_shape(*trial):
                    continue
                measure([x for m in moves[number:] if is_shape(*(x := _moved(best, m, stride)))])
            if known[trial] < known[best]:
                best, moved = trial, True
        if not moved:
            stride //= 2
    return TrellisShape(*best), known[best]


def _moved(shape: tuple[int, int, int], move: tuple[int, int, int], stride: int) -> tuple[int, int, int]:
    return shape[0] + stride * move[0], shape[1] + stride * move[1], shape[2] + stride * move[2]


def is_shape(scale: int, zero: int, blend: int) -> bool:
    """Whether there is a shape of these numbers."""
    return 0 <= scale < TRELLIS_SCALES and 0 <= zero < TRELLIS_ZEROS and 0 <= blend < TRELLIS_BLENDS


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

    def tables_of(self, matrix: int, keys: list[int], order: Order, some: slice = ALL) -> Int[np.ndarray, "lanes m"]:
        """The position in `keys` of the class of every entry of a matrix, lane by lane, of all lanes or of some."""
        place = np.zeros(keys[-1] - keys[0] + 1, np.int16)
        place[np.array(keys) - keys[0]] = np.arange(len(keys))
        row, col = self.spreads[matrix]
        return place[sums_in_lanes(row, col - keys[0], order, some)]


def starting_plan(spreads: Sequence[RowsCols]) -> TrellisPlan:
    """Classes from expected spreads (rows, columns), with shapes not yet fitted."""
    rounded = [quantize_spreads(rho, kappa, SPREAD_PRECISIONS[0]) for rho, kappa in spreads]
    return _with_default_shapes(TrellisPlan(SPREAD_PRECISIONS[0], rounded, {}))


def fit_plan(
    indices: Sequence[Int[np.ndarray, "_ _"]],
    orders: Sequence[Order],
    states: int,
    fits: Sequence[RowsCols],
    precisions: Sequence[int] = SPREAD_PRECISIONS,
) -> TrellisPlan:
    """The cheapest precision with its shapes: code length (of real-valued tables) + bytes of spreads and shapes.

    Args:
        indices: of all matrices, each asked for once a precision.
        orders: of their lanes.
        states: of the trellis.
        fits: row and column spreads of each; those of the coordinates before rounding are closer than those of values.
        precisions: to choose from; 0, one class per matrix, always fits.
    """
    best, least = None, np.inf
    shapes: OctaveShapes = {}
    for precision in precisions:
        plan = TrellisPlan(precision, [quantize_spreads(*fit, precision) for fit in fits], {})
        if plan.keys()[-1] - plan.keys()[0] >= MAX_CLASSES:
            continue
        plan, bits = _fit_shapes(_with_default_shapes(plan), indices, orders, states, shapes)
        shapes = shapes | plan.shapes
        bits += 8 * (len(write_shapes(plan)) + len(pack_spreads(plan.spreads)))
        if bits < least:
            best, least = plan, bits
    return fit_plan(indices, orders, states, fits, (0,)) if best is None else best


def _with_default_shapes(plan: TrellisPlan) -> TrellisPlan:
    octaves = {octave_of(log2_spread(key, plan.precision)) for key in plan.keys()}  # noqa: SIM118 - a tuple
    return plan._replace(shapes={(octave, grid): TrellisShape() for octave in octaves for grid in range(2)})


def _fit_shapes(
    plan: TrellisPlan,
    indices: Sequence[Int[np.ndarray, "_ _"]],
    orders: Sequence[Order],
    states: int,
    known: OctaveShapes,
) -> tuple[TrellisPlan, float]:
    """The plan with fitted shapes, and its bits; shapes of another precision are near and start the search."""
    keys = plan.keys()
    middles = [log2_spread(key, plan.precision) for key in keys]
    spread = np.array([2.0 ** (a / b) for a, b in middles])
    raw = np.array([raw_bits(m) for m in middles])
    octave = np.array([octave_of(m) for m in middles])
    counts, bits = np.zeros((len(keys), 2, _COUNTED)), 0
    for matrix, (k, order) in enumerate(zip(indices, orders, strict=True)):
        height = max(1, _AT_ONCE // len(k))
        for some in (slice(i, i + height) for i in range(0, k.shape[1], height)):
            lanes = walked_lanes(k, order, states, some)
            bits += _count(*lanes, plan.tables_of(matrix, keys, order, some), raw, counts)
    shapes, bits = {}, float(bits)
    for o, grid in plan.shapes:
        some = octave == o
        used = int(np.flatnonzero(counts[some, grid].any(axis=0)).max(initial=0)) + 2
        part = np.ascontiguousarray(counts[some, grid, :used])
        start, stride = (known[o, grid], 1) if (o, grid) in known else (TrellisShape(), 4)
        shapes[o, grid], coded = fit_shape(start, grid, spread[some], raw[some], part, stride)
        bits += coded
    return plan._replace(shapes=shapes), bits


@kernel()
@no_type_check
def _count(k, grids, tables, raw, counts):
    """Counts |k| >> raw by class and grid in place; the bits of signs and raw low bits."""
    bits, last = 0, counts.shape[2] - 1
    for lane in range(k.shape[0]):
        for i in range(k.shape[1]):
            table, magnitude = tables[lane, i], abs(k[lane, i])
            counts[table, grids[lane, i], min(magnitude >> raw[table], last)] += 1
            bits += raw[table] + (magnitude > 0)
    return bits


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
            shape = plan.shapes.get((octave, grid), TrellisShape())
            spread = np.array([2.0 ** (middle[0] / middle[1])])
            p = masses([shape], grid, spread, np.zeros(1, np.int64), BITS_SIZE)[0, 0] + 2.0**-PRECISION
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
        last = TrellisShape()
        for octave in sorted({o for o, _ in plan.shapes}):
            shape = plan.shapes[octave, grid]
            out.gammas(zigzag(a - b) for a, b in zip(shape, last, strict=True))
            last = shape
    return out.bytes()


def read_shapes(data: bytes, plan: TrellisPlan) -> TrellisPlan:
    """Inverse of `write_shapes` for a plan whose spreads are known; raises ValueError for damaged bytes."""
    keys = plan.keys()
    if keys[-1] - keys[0] >= MAX_CLASSES:
        raise ValueError(f"{keys[-1] - keys[0]} classes")
    source, shapes = BitReader(data), {}
    for grid in range(2):
        last = TrellisShape()
        for octave in sorted({o for o, _ in _with_default_shapes(plan).shapes}):
            last = TrellisShape(*(a + unzigzag(b) for a, b in zip(last, source.gammas(3), strict=True)))
            if not is_shape(*last):
                raise ValueError(f"a table's shape is {tuple(last)}")
            shapes[octave, grid] = last
    return plan._replace(shapes=shapes)
